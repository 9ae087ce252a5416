"""Where bottom or trunk learn nothing, the rest learns as in the unsplit model, to the bit."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from conf.schema import TrainConfig
from flower_app.client import streamed
from flower_app.data.client import Batch
from models import split
from models.parts import Part
from simulations.equality.fold import fold
from simulations.equality.local_link import LocalLink
from simulations.equality.reference import train_whole
from strategies.engine.engine import TrunkEngine
from strategies.engine.session import Session
from strategies.errors import TrunkError
from tests.strategies.helpers import CUT, H, engine_for, place, tiny_model, twin

STRATEGIES = ("splitfed-v1", "splitfed-v2", "merged")

FROZEN = {"bottom": [0], "bottom and first of the trunk": [0, 1], "bottom and trunk": [0, 1, 2]}
"""Blocks that learn nothing, of four: one in the bottom, two in the trunk, one in the top."""


def settings(strategy: str = "splitfed-v1", **changes: Any) -> TrainConfig:
    values = {"optimizer": "sgd", "lr": 0.5, "clip": 0.0, **changes}
    return TrainConfig(strategy=strategy, **values)


def blocks(part: Part | PreTrainedModel) -> nn.ModuleList:
    name = part.block_list if isinstance(part, Part) else "model.layers"
    model = part.model if isinstance(part, Part) else part
    found = model.get_submodule(name)
    assert isinstance(found, nn.ModuleList)
    return found


def frozen_model(numbers: list[int]) -> PreTrainedModel:
    """With these blocks and the embedding frozen."""
    model = tiny_model(tie_word_embeddings=False)
    model.get_input_embeddings().requires_grad_(False)
    for number in numbers:
        blocks(model)[number].requires_grad_(False)
    return model


def batch(seed: int) -> Batch:
    """16 tokens that count: division by a power of two, in whatever order, is exact."""
    ids = torch.randint(3, 40, (2, 9), generator=torch.Generator().manual_seed(seed))
    return Batch(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        labels=torch.cat([torch.full((2, 1), -100), ids[:, 1:]], 1),
    )


class Unwanting(LocalLink):
    """Says that dL/dh1 is not wanted, and sends no gradient where none is needed."""

    def backward(  # type: ignore[override]
        self, step: int, micro: int, grad_BTD: Tensor | None, mask_BT: Tensor | None, **kw: Any
    ) -> None:
        if not self._session.learns(micro):
            grad_BTD = None
        answer = self._session.backward(step, micro, grad_BTD, **kw)
        assert answer[0] is None
        self._gradients.append(answer)


@pytest.mark.parametrize("frozen", FROZEN)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_learns_learns_as_in_the_unsplit_model_to_the_bit(strategy: str, frozen: str) -> None:
    model = frozen_model(FROZEN[frozen])
    whole, first = twin(model), twin(model)
    train, steps = settings(strategy), [[batch(seed)] for seed in range(4)]

    parts = split(model, CUT)
    engine = engine_for(parts.trunk, train)
    engine.open_round(1, 1, training=True, cohort=1)
    link = Unwanting(engine.open("one", client="client-0", steps=len(steps)))
    outcome = streamed.train(parts.bottom, parts.top, link, steps, len(steps), train, place())
    fold(engine, {"one": outcome.tokens})
    train_whole(whole, steps, train)

    learnt = dict(whole.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, learnt[name]), name
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, learnt[name]) != parameter.requires_grad, name


@pytest.mark.parametrize("wanted", [False, True])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_graph_begins_at_the_first_block_that_learns(strategy: str, wanted: bool) -> None:
    trunk = split(frozen_model([0, 1]), CUT).trunk
    seen = watched(trunk)
    session = one_session(trunk, strategy)

    session.compute(0, 0, H, None, wanted=wanted)

    assert seen == [wanted, wanted]
    grad_BTD, square = session.backward(0, 0, H, last=True, tokens=8)
    assert (grad_BTD is not None) == wanted
    assert square > 0


def watched(trunk: Part) -> list[bool]:
    """Of each block's forward, in order: whether its input belongs to autograd's graph."""
    seen: list[bool] = []
    for block in blocks(trunk)[trunk.blocks.start : trunk.blocks.stop]:
        block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].requires_grad))
    return seen


def one_session(trunk: Part, strategy: str, **changes: Any) -> Session:
    engine: TrunkEngine = engine_for(trunk, settings(strategy, **changes), timeout=5.0)
    engine.open_round(1, 1, training=True, cohort=1)
    return engine.open("a", client="a", steps=2)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_frozen_trunk_of_a_frozen_bottom_keeps_nothing(
    strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = one_session(split(frozen_model([0, 1, 2]), CUT).trunk, strategy)
    monkeypatch.setattr(torch.autograd, "backward", lambda *a, **k: pytest.fail("went back"))

    for step in range(2):
        session.compute(step, 0, H, None, wanted=False)
        assert not session.learns(0)
        assert session.backward(step, 0, None, last=True, tokens=8) == (None, 0.0)
        result = session.apply(step, client_square_norm=4.0, tokens=8)
        assert result.grad_norm == 2.0


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("frozen", "wanted"), [([0, 1], False), ([0, 1, 2], True)])
def test_a_gradient_that_something_learns_from_must_come(
    strategy: str, frozen: list[int], wanted: bool
) -> None:
    session = one_session(split(frozen_model(frozen), CUT).trunk, strategy)
    session.compute(0, 0, H, None, wanted=wanted)
    assert session.learns(0)

    with pytest.raises(TrunkError, match="goes back without a gradient") as refused:
        session.backward(0, 0, None, last=True, tokens=8)
    assert refused.value.kind == "shape"

    session.backward(0, 0, H, last=True, tokens=8)  # and nothing is lost


@pytest.mark.parametrize("frozen", [[0, 1], [0, 1, 2]])
def test_in_a_merged_batch_who_wants_dl_dh1_has_it_to_the_bit(frozen: list[int]) -> None:
    """With a frozen trunk one member sends no gradient, the other waits for its own."""
    both = merged_step(frozen, {"a": True, "b": True})
    one = merged_step(frozen, {"a": False, "b": True})

    assert one["a"][0] is None
    assert one["b"][0] is not None
    assert torch.equal(one["b"][0], both["b"][0])
    assert one["a"][1] == one["b"][1] == both["a"][1]


def merged_step(frozen: list[int], wanted: dict[str, bool]) -> dict[str, tuple[Any, float]]:
    """The answers to one backward of each client."""
    engine = engine_for(split(frozen_model(frozen), CUT).trunk, settings("merged"), timeout=20.0)
    engine.open_round(1, 1, training=True, cohort=len(wanted))
    sessions = {client: engine.open(client, client=client, steps=1) for client in wanted}

    def work(client: str) -> tuple[Any, float]:
        session, own = sessions[client], H * (1 + ord(client))
        session.compute(0, 0, own, None, wanted=wanted[client])
        grad_BTD = own if session.learns(0) else None
        return session.backward(0, 0, grad_BTD, last=True, tokens=8)

    with ThreadPoolExecutor(len(wanted)) as pool:
        return dict(zip(wanted, pool.map(work, wanted), strict=True))
