"""Projecting products of factors: against dense float64 matrices and their SVD."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.adapters import tune_whole
from strategies.aggregate import lora as lora_average
from strategies.aggregate.lora import A_NAME, B_NAME, Adapter, Layer
from tests.strategies.helpers import tiny_model

ALPHA, OUT, IN = 16.0, 24, 40
NAME = "model.layers.3.self_attn.q_proj"

pytestmark = pytest.mark.usefixtures("one_thread")


def random_adapter(seed: int, rank: int, out: int = OUT, inputs: int = IN) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(rank, inputs, generator=generator)
    return Adapter(A, torch.randn(out, rank, generator=generator))


def product(adapter: Adapter) -> Tensor:
    """What the adapter adds, the plain way."""
    return adapter.B_Or.double() @ adapter.A_rI.double() * (ALPHA / len(adapter.A_rI))


def spare(rank: int, inputs: int = IN) -> Tensor:
    return lora_average.initial_A(NAME, rank, inputs, seed=0)


def project(adapters: list[Adapter], shares: list[float], rank: int) -> Adapter:
    left, right = lora_average.stack(adapters, shares, ALPHA)
    rows = spare(rank, right.shape[1])
    return lora_average.project(left, right, rank=rank, alpha=ALPHA, spare_rI=rows)


@pytest.mark.parametrize("ranks", [(2, 4, 8), (4, 4), (8, 8, 8, 8)])
def test_stacked_factors_are_the_mean_of_the_products(ranks: tuple[int, ...]) -> None:
    adapters = [random_adapter(seed, rank) for seed, rank in enumerate(ranks)]
    shares = [(k + 1) / sum(range(len(ranks) + 1)) for k in range(len(ranks))]

    left, right = lora_average.stack(adapters, shares, ALPHA)

    expected = sum(w * product(a) for w, a in zip(shares, adapters, strict=True))
    assert left.shape[1] == sum(ranks)
    torch.testing.assert_close(left @ right, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("out", [OUT, 6, 60])
@pytest.mark.parametrize("rank", [1, 3, 6])
def test_projection_is_the_truncated_svd(rank: int, out: int) -> None:
    adapters = [random_adapter(seed, 5, out) for seed in range(4)]
    mean = sum(product(a) for a in adapters) / 4
    U, sigma, V = torch.linalg.svd(mean, full_matrices=False)

    found = project(adapters, [0.25] * 4, rank)

    best = U[:, :rank] * sigma[:rank] @ V[:rank]
    torch.testing.assert_close(product(found), best, rtol=1e-10, atol=1e-10)


def test_no_dense_svd_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    svd = torch.linalg.svd
    monkeypatch.setattr(
        torch.linalg, "svd", lambda m, **kw: (seen.append(tuple(m.shape)), svd(m, **kw))[1]
    )

    project([random_adapter(0, 3), random_adapter(1, 4)], [0.5, 0.5], rank=4)

    assert seen == [(7, 7)]


@pytest.mark.parametrize("size", [1e-9, 1.0, 1e6])
def test_rows_of_a_are_as_long_as_at_the_start(size: float) -> None:
    adapters = [Adapter(a.A_rI, size * a.B_Or) for a in (random_adapter(s, 4) for s in (0, 1))]

    found = project(adapters, [0.5, 0.5], rank=6)

    start = spare(4000, 300).double().norm(dim=1).mean().item()
    assert found.A_rI.norm(dim=1).tolist() == pytest.approx([start] * 6, rel=0.01)


def test_a_direction_without_content_can_learn() -> None:
    one = random_adapter(0, 2)

    found = project([one], [1.0], rank=5)

    torch.testing.assert_close(product(found), product(one), rtol=1e-10, atol=1e-10)
    assert not found.B_Or[:, 2:].any()
    assert torch.equal(found.A_rI[2:], spare(5)[2:].double())
    A, B = found.A_rI.requires_grad_(), found.B_Or.requires_grad_()
    x = torch.randn(7, IN, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ((x @ A.T) @ B.T).pow(3).sum().add((x @ A.T @ B.T).sum()).backward()
    assert B.grad is not None
    assert (B.grad.norm(dim=0) > 0.1).all()


def test_nothing_becomes_an_adapter_as_it_starts() -> None:
    blank = Adapter(torch.randn(4, IN), torch.zeros(OUT, 4))

    found = project([blank, blank], [0.5, 0.5], rank=8)

    assert torch.equal(found.A_rI, spare(8).double())
    assert not found.B_Or.any()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_spare_rows_are_those_that_a_model_starts_with(family: str) -> None:
    from conf.schema import LoraSettings

    model = tune_whole(tiny_model(family), "lora", lora=LoraSettings(rank=3), seed=5)
    found = {n: p for n, p in model.named_parameters() if n.endswith(A_NAME)}

    assert found
    for name, value in found.items():
        layer = name.removesuffix(A_NAME)
        assert layer + B_NAME in dict(model.named_parameters())
        assert torch.equal(lora_average.initial_A(layer, *value.shape, seed=5), value)


@pytest.mark.parametrize("rank", [2, 30])
def test_norm_of_a_product_and_of_a_tiny_difference(rank: int) -> None:
    left, right = lora_average.stack([random_adapter(0, rank)], [1.0], ALPHA)
    off = torch.zeros_like(left)
    off[0, 0] = 1e-11

    norm = lora_average.product_norm(left, right)
    tiny = lora_average.product_norm(
        torch.cat([left + off, -left], dim=1), torch.cat([right, right])
    )

    assert norm == pytest.approx((left @ right).norm().item(), rel=1e-12)
    assert tiny == pytest.approx((off @ right).norm().item(), rel=1e-2)


def test_a_layer_gives_other_ranks_and_says_what_they_lack() -> None:
    held = random_adapter(0, 6)
    layer = Layer(name=NAME, adapter=held, alpha=ALPHA, seed=0)

    assert layer.at(6) is held
    assert layer.residual(6) is None
    for rank in (2, 8):
        residual = layer.residual(rank)
        assert residual is not None
        assert layer.at(rank).rank == rank
        torch.testing.assert_close(
            product(layer.at(rank)) + residual.double(), product(held), rtol=1e-6, atol=1e-5
        )


@pytest.mark.parametrize(
    ("state", "word"),
    [
        ({NAME + B_NAME: torch.ones(3, 2)}, "carol has only one of lora_A and lora_B"),
        ({NAME + A_NAME: torch.ones(3, 2)}, "carol has only one"),
        ({NAME + A_NAME: torch.ones(3, 2), NAME + B_NAME: torch.ones(3, 2)}, "not of one rank"),
    ],
)
def test_half_an_adapter_is_refused(state: dict, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        lora_average.adapter_of(state, NAME, "carol")
