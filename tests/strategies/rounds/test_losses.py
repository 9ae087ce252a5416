"""Which round is the best, and when training no longer helps."""

from __future__ import annotations

import pytest

from strategies.rounds.losses import Losses

NAN = float("nan")


@pytest.mark.parametrize(
    ("patience", "losses", "stops"),
    [
        (0, [5, 6, 7, 8], None),
        (1, [5, 4, 3, 3], 3),  # an equal loss is no better
        (2, [5, 4, 4.5, 3.9, 4, 4.1, 1], 5),
        (2, [5, 6, 7], 2),  # no better than before training
        (2, [5, 4, None, None, 4.5, 4.2], 5),  # rounds that nobody evaluated do not count
        (2, [5, 4, NAN, float("inf"), 4.5, 4.2], 5),
        (2, [None, None, None, None], None),
    ],
)
def test_a_run_ends_when_the_loss_has_not_fallen_for_so_many_rounds(
    patience: int, losses: list[float | None], stops: int | None
) -> None:
    judged, ended = Losses(patience), None
    for number, loss in enumerate(losses):
        judged.add(number, loss)
        if judged.stops(number, 100) is not None:
            ended = number
            break

    assert ended == stops


def test_the_reason_names_loss_round_and_setting() -> None:
    losses = Losses(1)
    for number, loss in enumerate([5.0, 4.0, 4.5]):
        losses.add(number, loss)

    stopped = losses.stops(2, 3)

    assert stopped is not None
    assert "4.0000 of round 1 for 1 rounds (train.patience=1)" in stopped.why
    assert losses.stops(3, 3) is None, "the last round ends it anyway"


def test_asked_to_stop_is_no_reason_of_its_own() -> None:
    stopped = Losses(0).stops(1, 3, lambda: True)

    assert stopped is not None
    assert stopped.why == ""


def test_the_best_is_the_first_of_the_lowest_after_training() -> None:
    """What was there before training is nobody's result."""
    losses = Losses(0)
    better = [losses.add(number, loss) for number, loss in enumerate([1.0, 3.0, 2.0, 2.0, NAN])]

    assert better == [False, True, True, False, False]
    assert losses.best == 2


def test_a_resumed_run_judges_by_the_rounds_before() -> None:
    losses, again = Losses(2), Losses(2)
    for number, loss in enumerate([5.0, 4.0, 4.5]):
        losses.add(number, loss)

    again.load_state_dict(losses.state_dict())
    again.add(2, 4.6)  # evaluated anew

    assert again.of(2) == 4.6
    assert again.stops(2, 9) is None
    again.add(3, 4.7)
    assert again.stops(3, 9) is not None
