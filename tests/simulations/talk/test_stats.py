"""Figures of answers add up, and follow a split model's running sums."""

from __future__ import annotations

import pytest

from models.elsewhere import Tally
from simulations.talk.stats import Figures
from tests.simulations.talk.helpers import speaker, spoken


def test_a_split_models_parts_are_those_of_this_answer() -> None:
    talker = speaker()
    tally = Tally(positions=100, seconds_trunk=9.0, bytes_up=5000)
    talker.model.tally = tally

    def count(_model, _args, given) -> None:
        tally.positions += given["input_ids"].shape[1]
        tally.trips += 1
        tally.seconds_trunk += 0.5
        tally.bytes_up += 10 * given["input_ids"].shape[1]

    talker.model.register_forward_pre_hook(count, with_kwargs=True)
    figures = spoken(talker, [50, 60, 70], max_tokens=4)[1][-1].figures
    assert figures.positions == 3 + 3
    assert figures.trips == 4
    assert figures.parts == (0.0, 0.0, 2.0, 0.0)
    assert figures.ms_of["trunk"] == pytest.approx(500.0)
    assert figures.bytes_each == (10.0, 0.0)


def test_figures_add_up() -> None:
    one = Figures(answers=1, tokens=10, seconds=2.0, parts=(1.0, 0.0, 0.5, 0.0), bytes_up=7)
    both = Figures() + one + one
    assert (both.answers, both.tokens, both.bytes_up) == (2, 20, 14)
    assert both.parts == (2.0, 0.0, 1.0, 0.0)
    assert both.rate == one.rate == 5.0
    assert Figures().rate == Figures().ms == 0.0
    assert Figures().ms_of == {}
    assert both.as_dict()["parts"]["trunk"] == 1.0
