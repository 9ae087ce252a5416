"""Adapters of stacked experts are averaged as if each expert were a layer of its own."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from conf.schema import AggregationConfig, Config, LoraSettings
from models.residuals import RESIDUAL
from strategies.aggregate.lora import A_NAME, B_NAME, form_but_rank
from strategies.aggregate.state import Contribution, GlobalState

LAYER, EXPERTS, OUT, IN, RANK = "model.layers.1.mlp.experts.gate_up_proj", 3, 12, 20, 4

pytestmark = pytest.mark.usefixtures("one_thread")


def config(lora: str) -> Config:
    return Config(
        lora=LoraSettings(rank=RANK, alpha=12.0), aggregation=AggregationConfig(lora=lora)
    )


def stacked(seed: int, rank: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        LAYER + A_NAME: torch.randn(rank, EXPERTS, IN, generator=generator),
        LAYER + B_NAME: torch.randn(OUT, rank, EXPERTS, generator=generator),
    }


def apart(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The experts as layers of their own."""
    found = {}
    for name, tensor in state.items():
        if name.endswith(A_NAME):
            pieces = tensor.unbind(1)
        else:
            pieces = tensor.unbind(2 if name.endswith(B_NAME) else 0)
        found |= {name.replace("gate_up_proj", f"{e}"): piece for e, piece in enumerate(pieces)}
    return found


def added(state: Mapping[str, Tensor], layer: str) -> Tensor:
    A, B = state[layer + A_NAME].double(), state[layer + B_NAME].double()
    return 12.0 / len(A) * B @ A + state.get(layer + RESIDUAL, torch.zeros(())).double()


def cohort(ranks: tuple[int, ...], *, separate: bool, seed: int = 0) -> list[Contribution]:
    states = [stacked(seed + k, rank) for k, rank in enumerate(ranks)]
    return [
        Contribution(f"client-{k}", 10.0 + k, apart(state) if separate else state)
        for k, state in enumerate(states)
    ]


@pytest.mark.parametrize("ranks", [(4, 4, 4), (2, 4, 6)])
@pytest.mark.parametrize("lora", ["factors", "svd", "exact"])
def test_experts_are_averaged_as_layers_of_their_own(lora: str, ranks: tuple[int, ...]) -> None:
    together, alone = GlobalState(config(lora)), GlobalState(config(lora))
    if lora == "factors" and len(set(ranks)) > 1:
        with pytest.raises(ValueError, match="of one rank"):
            together.update(1, cohort(ranks, separate=False))
        return
    for number in (1, 2):
        report = together.update(number, cohort(ranks, separate=False, seed=10 * number))
        other = alone.update(number, cohort(ranks, separate=True, seed=10 * number))
        assert report.lora_error == pytest.approx(other.lora_error, rel=1e-6, abs=1e-12)

    for rank in sorted({*ranks, RANK}):
        found = together.tensors(lambda name: True, rank)
        want = alone.tensors(lambda name: True, rank)
        assert found[LAYER + A_NAME].shape == (rank, EXPERTS, IN)
        assert found[LAYER + B_NAME].shape == (OUT, rank, EXPERTS)
        assert (LAYER + RESIDUAL in found) == (lora == "exact")
        own = apart(found)
        for expert in range(EXPERTS):
            layer = LAYER.replace("gate_up_proj", f"{expert}")
            torch.testing.assert_close(added(own, layer), added(want, layer), rtol=1e-4, atol=1e-5)


def test_frozen_a_of_experts_is_in_no_state() -> None:
    contributions = [
        Contribution(c.client, c.weight, {n: t for n, t in c.state.items() if A_NAME not in n})
        for c in cohort((4, 4), separate=False)
    ]
    state = GlobalState(config("ffa"))

    report = state.update(1, contributions)

    found = state.tensors(lambda name: True, RANK)
    want = sum(c.weight * c.state[LAYER + B_NAME] for c in contributions) / 21.0
    torch.testing.assert_close(found[LAYER + B_NAME], want)
    assert report.lora_error == pytest.approx(0, abs=1e-6)


def test_the_form_without_the_rank_keeps_the_experts() -> None:
    forms = {n: form_but_rank(n, t) for rank in (2, 5) for n, t in stacked(0, rank).items()}
    assert forms == {LAYER + A_NAME: (EXPERTS, IN), LAYER + B_NAME: (OUT, EXPERTS)}


def test_experts_of_another_number_are_refused() -> None:
    one, other = cohort((4, 4), separate=False)
    fewer = {name: t[:, :2] if A_NAME in name else t for name, t in other.state.items()}
    with pytest.raises(ValueError, match="experts"):
        GlobalState(config("svd")).update(1, [one, Contribution("client-1", 1.0, fewer)])
    with pytest.raises(ValueError, match="not of one rank"):
        GlobalState(config("svd")).update(1, [Contribution("client-1", 1.0, fewer)])
