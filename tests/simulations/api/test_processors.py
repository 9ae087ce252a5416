"""Penalties and bias by their definition, and log-probabilities that they do not touch."""

from __future__ import annotations

import pytest
import torch

from simulations.api.processors import Bias, Penalties, Recorder, processors
from simulations.api.scores import AT_ONCE, score_text
from simulations.api.wanted import Wanted
from simulations.talk.speaker import Speaker
from tests.simulations.api.helpers import logprobs_of


def test_penalties_count_what_was_generated_and_not_the_prompt() -> None:
    ids_BT = torch.tensor([[0, 0, 1, 2, 2, 2, 1], [0, 1, 2, 3, 3, 3, 3]])  # prompt: 0 0 1 / 0 1 2
    found = Penalties(3, frequency=0.5, presence=1.0)(ids_BT, torch.zeros(2, 5))
    assert found.tolist() == [[0, -1.5, -2.5, 0, 0], [0, 0, 0, -3.0, 0]]


def test_a_negative_penalty_makes_repetition_likelier() -> None:
    found = Penalties(0, frequency=-2.0, presence=0.0)(torch.tensor([[1, 1]]), torch.zeros(1, 2))
    assert found.tolist() == [[0, 4.0]]


def test_bias_is_added_to_its_tokens_in_every_row() -> None:
    found = Bias({2: -100.0, 0: 1.5})(torch.zeros(2, 0), torch.ones(2, 3))
    assert found.tolist() == [[2.5, 1.0, -99.0]] * 2


def test_the_recorder_comes_first_and_sees_what_nobody_touched() -> None:
    recorder = Recorder()
    wanted = Wanted(
        model="m", max_tokens=1, logit_bias={0: 9.0}, presence_penalty=2.0, repetition_penalty=3.0
    )
    logits = torch.tensor([[1.0, 2.0, 4.0]])
    changed = processors(wanted, 1, recorder)(torch.tensor([[2, 1]]), logits.clone())
    assert not torch.equal(changed, logits)

    seen = recorder.take(2, 1, top=2)
    expected = logits[0].log_softmax(-1)
    assert seen.logprob == pytest.approx(float(expected[1]))
    assert [token for token, _ in seen.top] == [2, 1]
    assert seen.top[1][1] == seen.logprob, "lm-eval finds greedy tokens by this equality"


def test_a_draft_that_is_taken_back_is_forgotten() -> None:
    recorder = Recorder()
    for logits in ([1.0, 0.0], [0.0, 1.0]):
        recorder(torch.zeros(1, 4, dtype=torch.long), torch.tensor([logits]))
    assert recorder.take(4, 1, top=1).top[0][0] == 1


@pytest.mark.parametrize("stretch", [AT_ONCE, 7, 1])
def test_a_text_is_scored_as_in_one_pass(
    speaker: Speaker, stretch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("simulations.api.scores.AT_ONCE", stretch)
    ids = [3 + place % 200 for place in range(22)]
    expected = logprobs_of(speaker, ids)

    found = score_text(speaker.model, ids, top=3)

    assert [one.token for one in found] == ids
    assert found[0].logprob is None
    for place, one in enumerate(found[1:]):
        assert one.logprob == pytest.approx(float(expected[place, one.token]), abs=1e-4)
        assert [t for t, _ in one.top] == expected[place].topk(3).indices.tolist()
