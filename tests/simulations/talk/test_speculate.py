"""Speculation by name: the same text in fewer trips, and nobody kept waiting for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LogitsProcessor, PreTrainedModel

from models import Cut, split
from models.bridge import Bridge, bridge_state, save_bridge
from models.elsewhere import Crossed
from models.remote import join_remote
from simulations.talk import chance
from simulations.talk.speaker import Conversation, Speaker
from simulations.talk.speculate import MODES, speculation
from strategies.generation.engine import GenerationEngine
from strategies.generation.local import LocalTrunk
from strategies.generation.memory import Limits
from tests.simulations.talk.helpers import bytes_tokenizer, family, spoken

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPT = [50, 51, 52, 53, 50, 51, 52, 53, 50, 51]


class Watched(LocalTrunk):
    """Notes of each trip how many positions it had, and whether others could draw meanwhile."""

    def __init__(self, engine: GenerationEngine) -> None:
        super().__init__(engine)
        self.trips: list[int] = []
        self.kept_waiting = False

    def open(self, fork: str = "") -> Any:
        session, forward = super().open(fork), None
        forward = session.forward

        def watched(h_BTD: Any, **how: Any) -> Crossed:
            self.trips.append(h_BTD.shape[1])
            self.kept_waiting |= chance._DRAWING.locked()
            return forward(h_BTD, **how)

        session.forward = watched  # type: ignore[method-assign]
        return session


def joined(kind: str = "llama", context: int = 128) -> tuple[PreTrainedModel, Watched]:
    parts = split(family(kind, max_position_embeddings=context), Cut(1, 1))
    trunk = Watched(GenerationEngine(parts.trunk, Limits()))
    return join_remote(parts.bottom, parts.top, trunk), trunk


def with_bridge(folder: Path, hidden_size: int = 32) -> Path:
    save_bridge(bridge_state(Bridge(hidden_size, 8)), folder)
    return folder


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
@pytest.mark.parametrize("mode", ["bridge", "lookup"])
def test_a_conversation_says_the_same_in_fewer_trips(kind: str, mode: str, tmp_path: Path) -> None:
    model, trunk = joined(kind)
    plain = Speaker(model, bytes_tokenizer(), "plain")
    options = speculation(model, mode, folders=[with_bridge(tmp_path)])
    quick, held, other = (
        Speaker(model, bytes_tokenizer(), "quick", options=options),
        Conversation(),
        Conversation(),
    )
    prompt = PROMPT
    for _ in range(2):
        own, _ = spoken(plain, prompt, other, max_tokens=24)
        trunk.trips.clear()
        ids, pieces = spoken(quick, prompt, held, max_tokens=24)
        assert ids == own
        assert pieces[-1].figures.each_trip == 24 / len(trunk.trips)
        assert len(trunk.trips) <= 24
        assert max(trunk.trips[1:]) > 1
        prompt = [*prompt, *ids, 60, 61]


@pytest.mark.parametrize("mode", ["bridge", "lookup"])
def test_a_seed_repeats_and_nobody_waits_for_a_trip(mode: str, tmp_path: Path) -> None:
    model, trunk = joined()
    options = speculation(model, mode, folders=[with_bridge(tmp_path)])
    talker = Speaker(model, bytes_tokenizer(), "quick", options=options)
    before = torch.get_rng_state()
    one, other = (spoken(talker, PROMPT, temperature=1.0, seed=5)[0] for _ in range(2))
    assert one == other
    assert not trunk.kept_waiting
    assert not chance._DRAWING.locked()
    assert torch.equal(torch.get_rng_state(), before)


def test_what_looks_at_each_step_is_asked_once_a_token() -> None:
    model, _ = joined()
    seen: list[int] = []

    class Watcher(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            seen.append(input_ids.shape[1])
            return scores

    talker = Speaker(model, bytes_tokenizer(), "quick", options=speculation(model, "lookup"))
    pieces = list(talker.stream(PROMPT, talker.defaults, processors=[Watcher()]))
    tokens = sum(len(piece.ids) for piece in pieces)
    assert seen == list(range(len(PROMPT), len(PROMPT) + tokens))


@pytest.mark.parametrize("mode", ["bridge", "lookup"])
def test_nothing_is_guessed_beyond_what_the_model_can_hold(mode: str, tmp_path: Path) -> None:
    model, trunk = joined(context=20)
    options = speculation(model, mode, folders=[with_bridge(tmp_path)])
    talker = Speaker(model, bytes_tokenizer(), "quick", options=options)
    ids, pieces = spoken(talker, PROMPT, max_tokens=100)
    assert (len(ids), pieces[-1].finish) == (10, "length")
    assert max(trunk.trips) <= 20


def test_auto_takes_what_there_is(tmp_path: Path) -> None:
    model, _ = joined()
    assert "assistant_model" in speculation(model, folders=[tmp_path, with_bridge(tmp_path / "b")])
    assert "prompt_lookup_num_tokens" in speculation(model, folders=[tmp_path / "none"])
    assert speculation(family("llama")) == {}  # whole: no trips to save
    assert speculation(joined("mamba")[0]) == {}
    assert speculation(model, "off") == {}
    draft = speculation(model, "bridge", folders=[tmp_path / "b"], tokens=3)["assistant_model"]
    assert draft.generation_config.num_assistant_tokens == 3


def test_what_cannot_be_is_refused_in_words(tmp_path: Path) -> None:
    model, _ = joined()
    with pytest.raises(ValueError, match="'fast' is unknown: " + ", ".join(MODES)):
        speculation(model, "fast")
    with pytest.raises(ValueError, match="train.bridge=256"):
        speculation(model, "bridge", folders=[tmp_path])
    with pytest.raises(ValueError, match="this model is whole"):
        speculation(family("llama"), "bridge", folders=[with_bridge(tmp_path)])
    with pytest.raises(ValueError, match="of 16, the model's have 32"):
        speculation(model, "bridge", folders=[with_bridge(tmp_path, hidden_size=16)])
    with pytest.raises(ValueError, match="recurrent state"):
        speculation(joined("mamba")[0], "lookup")
