"""A model whose trunk is elsewhere says what the whole one says, edits and all."""

from __future__ import annotations

import pytest

from models import Cut, split
from models.remote import join_remote
from simulations.talk.speaker import Conversation
from strategies.generation.engine import GenerationEngine
from strategies.generation.local import LocalTrunk
from strategies.generation.memory import Limits
from tests.simulations.talk.helpers import family, speaker, spoken

pytestmark = pytest.mark.usefixtures("one_thread")

A, B = list(range(10, 30)), list(range(60, 75))


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_a_split_model_answers_as_the_whole_one(kind: str) -> None:
    whole = family(kind)
    parts = split(whole, Cut(1, 1))
    model = join_remote(
        parts.bottom, parts.top, LocalTrunk(GenerationEngine(parts.trunk, Limits()))
    )
    talker, other, conversation = speaker(model), speaker(whole), Conversation()
    first = spoken(other, A)[0]
    for prompt in (A, [*A, *first, *B], [*A[:7], 99, *A[8:]]):
        for sampling in ({}, {"temperature": 1.0, "seed": 3}):
            ids, pieces = spoken(talker, prompt, conversation, max_tokens=6, **sampling)
            assert ids == spoken(other, prompt, max_tokens=6, **sampling)[0]
            figures = pieces[-1].figures
            assert figures.positions == len(prompt) - figures.reused + len(ids) - 1
            assert len(figures.parts) == 4
    assert (figures.reused > 0) == (kind == "llama")  # a window of 4 is computed anew
