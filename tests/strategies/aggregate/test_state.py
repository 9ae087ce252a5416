"""Averaging over the whole model: every result against plain dense matrices in float64."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from conf.schema import AggregationConfig, Config, LoraSettings
from models.adapters import initial_lora, merge, tune_whole
from models.residuals import RESIDUAL
from models.state import load_trainable_state, trainable_state
from strategies.aggregate.lora import A_NAME, B_NAME
from strategies.aggregate.state import Contribution, GlobalState
from tests.strategies.helpers import tiny_model

ALPHA, RANK, SEED = 12.0, 8, 3
LAYERS = {"model.layers.0.self_attn.q_proj": (24, 40), "model.layers.2.mlp.down_proj": (36, 20)}
PLAIN = "lm_head.weight"
TOKENS = (30.0, 10.0, 24.0)

pytestmark = pytest.mark.usefixtures("one_thread")


def config(lora: str = "factors", **aggregation: Any) -> Config:
    return Config(
        seed=SEED,
        lora=LoraSettings(rank=RANK, alpha=ALPHA),
        aggregation=AggregationConfig(lora=lora, **aggregation),
    )


def random_state(seed: int, rank: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for layer, (out, inputs) in LAYERS.items():
        state[layer + A_NAME] = torch.randn(rank, inputs, generator=generator)
        state[layer + B_NAME] = torch.randn(out, rank, generator=generator)
    state[PLAIN] = torch.randn(5, 7, generator=generator)
    return state


def cohort(ranks: Sequence[int] = (8, 8, 8), seed: int = 0) -> list[Contribution]:
    return [
        Contribution(f"client-{k}", TOKENS[k], random_state(10 * seed + k, rank))
        for k, rank in enumerate(ranks)
    ]


def only_b(contributions: Sequence[Contribution]) -> list[Contribution]:
    return [
        Contribution(c.client, c.weight, {n: t for n, t in c.state.items() if A_NAME not in n})
        for c in contributions
    ]


def added(state: Mapping[str, Tensor], layer: str) -> Tensor:
    """What a holder of `state` adds to the base weight of `layer`, the plain way."""
    A, B = state[layer + A_NAME].double(), state[layer + B_NAME].double()
    delta = ALPHA / A.shape[0] * B @ A
    return delta + state[layer + RESIDUAL].double() if layer + RESIDUAL in state else delta


def mean_of(items: Sequence[Tensor], weights: Sequence[float] = TOKENS) -> Tensor:
    pairs = zip(items, weights, strict=True)
    return sum((w * t.double() for t, w in pairs), torch.zeros(())) / sum(weights)


def mean_added(contributions: Sequence[Contribution], layer: str) -> Tensor:
    return mean_of([added(c.state, layer) for c in contributions])


def relative(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Error over all layers together, from dense matrices."""
    top = sum(float((found[n] - expected[n]).pow(2).sum()) for n in expected)
    return (top / sum(float(t.pow(2).sum()) for t in expected.values())) ** 0.5


def everything(name: str) -> bool:
    return True


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


# ---- factors and ffa --------------------------------------------------------------------------


def test_factors_are_averaged_one_by_one_and_the_error_is_told() -> None:
    contributions, state = cohort(), GlobalState(config())

    report = state.update(1, contributions)

    found = state.tensors(everything, RANK)
    assert list(found) == list(contributions[0].state)
    for name, tensor in found.items():
        expected = mean_of([c.state[name] for c in contributions])
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-6, atol=1e-7)
    error = relative(
        {layer: added(found, layer) for layer in LAYERS},
        {layer: mean_added(contributions, layer) for layer in LAYERS},
    )
    assert error > 0.1
    assert report.lora_error == pytest.approx(error, rel=1e-5)


def test_ffa_is_exact_with_the_a_that_every_client_starts_from() -> None:
    contributions, state = only_b(cohort()), GlobalState(config("ffa"))

    report = state.update(1, contributions)

    found = state.tensors(everything, RANK)
    for layer, (_, inputs) in LAYERS.items():
        shape = torch.nn.Parameter(torch.empty(RANK, inputs))
        A = {layer + A_NAME: initial_lora(layer + A_NAME, shape, SEED)}
        expected = mean_of([added({**c.state, **A}, layer) for c in contributions])
        torch.testing.assert_close(added({**found, **A}, layer), expected, rtol=1e-5, atol=1e-6)
        assert layer + A_NAME not in found
    assert report.lora_error is not None
    assert 0 < report.lora_error < 1e-7


def test_ffa_refuses_an_a_that_was_trained() -> None:
    with pytest.raises(ValueError, match=r"ffa freezes lora_A, and client-0 has trained"):
        GlobalState(config("ffa")).update(1, cohort())


@pytest.mark.parametrize("method", ["factors", "ffa"])
def test_mixed_ranks_of_factors_are_refused_with_the_remedy(method: str) -> None:
    contributions = cohort((2, 8, 4))
    if method == "ffa":
        contributions = only_b(contributions)

    with pytest.raises(ValueError, match="client-0 has 2, client-1 has 8, client-2 has 4") as error:
        GlobalState(config(method)).update(1, contributions)

    assert "aggregation.lora=exact or svd" in str(error.value)


@pytest.mark.parametrize("method", ["factors", "ffa"])
def test_factors_of_another_rank_are_not_given(method: str) -> None:
    contributions, state = cohort(), GlobalState(config(method))
    state.update(1, only_b(contributions) if method == "ffa" else contributions)

    with pytest.raises(ValueError, match=r"rank 8, the recipient's are of rank 4.*exact or svd"):
        state.tensors(everything, 4)
    assert list(state.tensors(lambda name: name == PLAIN, 4)) == [PLAIN]


def test_layers_may_have_ranks_of_their_own() -> None:
    first, second = LAYERS
    contributions = [
        Contribution(
            c.client,
            c.weight,
            {n: (t if first not in n else random_state(k, 4)[n]) for n, t in c.state.items()},
        )
        for k, c in enumerate(cohort())
    ]
    for method in ("factors", "exact", "svd"):
        state = GlobalState(config(method))
        report = state.update(1, contributions)
        ends = state.tensors(lambda name: name.startswith(first), 4)
        trunk = state.tensors(lambda name: name.startswith(second), 8)
        assert ends[first + A_NAME].shape[0] == 4
        assert trunk[second + A_NAME].shape[0] == 8
        if method == "exact":
            expected = mean_added(contributions, first)
            torch.testing.assert_close(added(ends, first), expected, rtol=1e-5, atol=1e-5)
            assert report.lora_error is not None
            assert report.lora_error < 1e-6


# ---- exact ------------------------------------------------------------------------------------


def trained(sent: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """What comes back: everything but the residual, moved a little."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: tensor + 0.1 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in sent.items()
        if not name.endswith(RESIDUAL)
    }


@pytest.mark.parametrize("ranks", [(8, 8, 8), (4, 4, 4), (2, 4, 8)])
@pytest.mark.parametrize("started", [False, True])
def test_exact_is_the_mean_for_every_recipient_round_after_round(
    ranks: tuple[int, ...], started: bool
) -> None:
    state = GlobalState(config("exact"))
    if started:
        state.start(random_state(99, RANK))
    sent = [state.tensors(everything, rank) or random_state(99, rank) for rank in ranks]
    for round in range(1, 5):
        came = [trained(tensors, 10 * round + k) for k, tensors in enumerate(sent)]
        residuals = [{n: t for n, t in s.items() if n.endswith(RESIDUAL)} for s in sent]
        expected = {
            layer: mean_of([added({**c, **r}, layer) for c, r in zip(came, residuals, strict=True)])
            for layer in LAYERS
        }

        report = state.update(
            round, [Contribution(f"c{k}", TOKENS[k], c) for k, c in enumerate(came)]
        )

        assert report.lora_error is not None
        assert report.lora_error < 1e-6
        for rank in (2, 3, 4, 8, 12):
            held = state.tensors(everything, rank)
            assert {t.shape[0] for n, t in held.items() if n.endswith(A_NAME)} == {rank}
            assert relative({n: added(held, n) for n in LAYERS}, expected) < 1e-6
            assert {held[n + RESIDUAL].shape for n in LAYERS} == set(LAYERS.values())
        sent = [state.tensors(everything, rank) for rank in ranks]


def test_exact_keeps_the_mean_factors_if_the_ranks_are_equal() -> None:
    contributions, state = cohort(), GlobalState(config("exact"))

    state.update(1, contributions)

    found = state.tensors(everything, RANK)
    assert [n for n in found if not n.endswith(RESIDUAL)] == list(contributions[0].state)
    for name in contributions[0].state:
        expected = mean_of([c.state[name] for c in contributions])
        torch.testing.assert_close(found[name].double(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("method", ["exact", "svd"])
def test_mixed_ranks_do_not_collapse(method: str) -> None:
    contributions, state = cohort((2, 4, 8)), GlobalState(config(method))
    state.start(random_state(99, 2))

    state.update(1, contributions)

    for rank in (2, 4, 8):
        found = state.tensors(everything, rank)
        for layer in LAYERS:
            A, B = found[layer + A_NAME].double(), found[layer + B_NAME].double()
            assert torch.linalg.matrix_rank(B @ A, rtol=1e-4) == rank
            best = truncated(mean_added(contributions, layer), rank)
            torch.testing.assert_close(ALPHA / rank * B @ A, best, rtol=1e-4, atol=1e-4)


# ---- svd --------------------------------------------------------------------------------------


def truncated(matrix: Tensor, rank: int) -> Tensor:
    U, sigma, V = torch.linalg.svd(matrix, full_matrices=False)
    return U[:, :rank] * sigma[:rank] @ V[:rank]


@pytest.mark.parametrize("ranks", [(8, 8, 8), (4, 4, 4), (2, 4, 8), (8, 4, 4), (16, 16, 2)])
def test_svd_is_within_a_hundredth_of_the_optimum(ranks: tuple[int, ...]) -> None:
    contributions, state = cohort(ranks), GlobalState(config("svd"))

    report = state.update(1, contributions)

    expected = {layer: mean_added(contributions, layer) for layer in LAYERS}
    for rank in (2, 4, RANK):
        found = state.tensors(everything, rank)
        best = relative({n: truncated(t, rank) for n, t in expected.items()}, expected)
        error = relative({n: added(found, n) for n in LAYERS}, expected)
        assert best * (1 - 1e-6) <= error <= best * 1.01
        assert not any(name.endswith(RESIDUAL) for name in found)
    assert report.lora_error == pytest.approx(error, rel=1e-4)


def test_svd_keeps_the_rank_of_a_wide_client_that_sits_a_round_out() -> None:
    state, wide = GlobalState(config("svd")), 12
    state.update(1, cohort((wide, 4, 4)))
    contributions = cohort((4, 4, 4), seed=1)

    state.update(2, contributions)

    found = state.tensors(everything, wide)
    for layer in LAYERS:
        expected = mean_added(contributions, layer)
        assert torch.linalg.matrix_rank(expected, rtol=1e-4) == wide
        torch.testing.assert_close(added(found, layer), expected, rtol=1e-4, atol=1e-4)


def test_svd_of_two_clients_is_better_than_the_mean_of_factors() -> None:
    errors = {}
    for method in ("factors", "svd", "exact"):
        errors[method] = GlobalState(config(method)).update(1, cohort()).lora_error or 0.0

    assert errors["factors"] > 1.2 * errors["svd"]
    assert errors["svd"] > 1e3 * errors["exact"]


# ---- against peft -----------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("ranks", [(4, 4, 4), (2, 4, 8)])
def test_exact_equals_the_mean_of_merged_models(family: str, ranks: tuple[int, ...]) -> None:
    base = tiny_model(family)

    def adapted(rank: int) -> torch.nn.Module:
        alpha = ALPHA
        lora = LoraSettings(rank=rank, alpha=alpha)
        return tune_whole(copy.deepcopy(base), "lora", lora=lora, seed=SEED)

    state, merged = GlobalState(config("exact")), []
    contributions = []
    for k, rank in enumerate(ranks):
        model = adapted(rank)
        load_trainable_state(model, trained(trainable_state(model), k))
        copied = {n: t.clone() for n, t in trainable_state(model).items()}
        contributions.append(Contribution(f"client-{k}", TOKENS[k], copied))
        merge(model)
        merged.append(dict(model.named_parameters()))
    state.update(1, contributions)

    for rank in (2, 4):
        model, sent = adapted(rank), state.tensors(everything, rank)
        residuals = {n: sent.pop(n) for n in list(sent) if n.endswith(RESIDUAL)}
        load_trainable_state(model, sent)
        merge(model)
        own = dict(model.named_parameters())
        with torch.no_grad():
            for name, residual in residuals.items():
                weight = own[name.removesuffix(RESIDUAL) + ".weight"]
                weight += residual.T if family == "gpt2" else residual
        assert residuals
        for name, weight in own.items():
            expected = mean_of([m[name] for m in merged])
            torch.testing.assert_close(weight.double(), expected, rtol=1e-5, atol=1e-6)


# ---- every method -----------------------------------------------------------------------------

METHODS = ("factors", "ffa", "exact", "svd")


def suited(method: str, seed: int = 0) -> list[Contribution]:
    ranks = (2, 4, 8) if method in ("exact", "svd") else (8, 8, 8)
    found = cohort(ranks, seed)
    return only_b(found) if method == "ffa" else found


@pytest.mark.parametrize("method", METHODS)
def test_arrival_does_not_matter(method: str) -> None:
    results = []
    for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
        state = GlobalState(config(method))
        for round in (1, 2):
            contributions = suited(method, round)
            report = state.update(round, [contributions[k] for k in order])
        results.append((report, state.tensors(everything, RANK)))

    for report, tensors in results[1:]:
        assert report == results[0][0]
        assert same(tensors, results[0][1])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", [PLAIN, next(iter(LAYERS)) + B_NAME])
def test_who_is_not_finite_is_named_and_nothing_changes(
    method: str, value: float, which: str
) -> None:
    state = GlobalState(config(method))
    state.update(1, suited(method))
    before = state.state_dict()
    bad = suited(method, seed=1)
    bad[1].state[which][0, 0] = value

    with pytest.raises(ValueError, match=f"'{which}' of client-1 holds a value that is not finite"):
        state.update(2, bad)

    assert same(before, state.state_dict())


@pytest.mark.parametrize("method", METHODS)
def test_a_snapshot_takes_a_round_back(method: str) -> None:
    state = GlobalState(config(method))
    state.update(1, suited(method))
    kept = state.state_dict()
    expected = (state.update(2, suited(method, 1)), state.tensors(everything, RANK))
    state.update(3, suited(method, 2))
    other = GlobalState(config(method))
    other.load_state_dict({name: tensor.clone() for name, tensor in kept.items()})
    state.load_state_dict(kept)

    for again in (state, other):
        report = again.update(2, suited(method, 1))
        assert report == expected[0]
        assert same(again.tensors(everything, RANK), expected[1])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("change", ["missing", "extra", "plain shape", "inputs", "outputs"])
@pytest.mark.parametrize("held", [False, True])
def test_a_contribution_of_another_form_is_refused(method: str, change: str, held: bool) -> None:
    state, contributions = GlobalState(config(method)), suited(method)
    if held:
        state.update(1, suited(method))
    own, layer = contributions[1].state, next(iter(LAYERS))
    assert isinstance(own, dict)
    name = {"inputs": layer + A_NAME, "outputs": layer + B_NAME}.get(change, PLAIN)
    if name not in own:
        pytest.skip("ffa has no A")
    wider = torch.ones(own[name].shape[0] + 1, own[name].shape[1])
    edits = {
        "missing": lambda: own.pop(PLAIN),
        "extra": lambda: own.update(more=torch.ones(1)),
        "plain shape": lambda: own.update({PLAIN: torch.ones(7, 5)}),
        "inputs": lambda: own.update({name: torch.ones(own[name].shape[0], 3)}),
        "outputs": lambda: own.update({name: wider}),
    }
    edits[change]()

    with pytest.raises(ValueError, match="client-1"):
        state.update(2, contributions)


@pytest.mark.parametrize("method", METHODS)
def test_a_whole_cohort_of_another_form_is_refused(method: str) -> None:
    state = GlobalState(config(method))
    state.update(1, suited(method))
    other = [
        Contribution(c.client, c.weight, {**c.state, PLAIN: torch.ones(7, 5)})
        for c in suited(method)
    ]

    with pytest.raises(ValueError, match=r"lm_head.weight.* at client-0 and .* at the federation"):
        state.update(2, other)


@pytest.mark.parametrize("method", ["factors", "exact", "svd"])
def test_a_start_is_given_as_it_is(method: str) -> None:
    state, initial = GlobalState(config(method)), random_state(0, RANK)
    assert state.tensors(everything, RANK) == {}

    state.start(initial)

    assert same(state.tensors(everything, RANK), initial)
    layer = next(iter(LAYERS))
    part = state.tensors(lambda name: name.startswith(layer), RANK)
    assert set(part) == {layer + A_NAME, layer + B_NAME}
    initial[PLAIN].zero_()
    assert state.tensors(everything, RANK)[PLAIN].any()


@pytest.mark.parametrize("method", ["exact", "svd"])
def test_a_blank_start_is_blank_at_every_rank(method: str) -> None:
    state, initial = GlobalState(config(method)), random_state(0, RANK)
    state.start({n: torch.zeros_like(t) if B_NAME in n else t for n, t in initial.items()})

    found = state.tensors(everything, 4)

    assert not any(name.endswith(RESIDUAL) for name in found)
    for layer, (_, inputs) in LAYERS.items():
        shape = torch.nn.Parameter(torch.empty(4, inputs))
        assert torch.equal(found[layer + A_NAME], initial_lora(layer + A_NAME, shape, SEED))
        assert not found[layer + B_NAME].any()


@pytest.mark.parametrize("method", METHODS)
def test_dtypes_are_kept(method: str) -> None:
    contributions = [
        Contribution(c.client, c.weight, {n: t.bfloat16() for n, t in c.state.items()})
        for c in suited(method)
    ]
    state = GlobalState(config(method))

    report = state.update(1, contributions)

    found = state.tensors(everything, RANK)
    for name, tensor in found.items():
        assert tensor.dtype == (torch.float32 if name.endswith(RESIDUAL) else torch.bfloat16)
    expected = mean_of([c.state[PLAIN] for c in contributions])
    assert torch.equal(found[PLAIN], expected.bfloat16())
    if method == "exact":
        assert report.lora_error is not None
        assert report.lora_error < 1e-6


def test_without_adapters_there_is_no_error_to_tell() -> None:
    plain = [Contribution("a", 1, {"w": torch.ones(2)}), Contribution("b", 3, {"w": torch.ones(2)})]

    for method in METHODS:
        assert GlobalState(config(method)).update(1, plain).lora_error is None


@pytest.mark.parametrize("method", ["factors", "exact", "svd"])
def test_nothing_off_nothing_is_no_error(method: str) -> None:
    blank = [
        Contribution(c.client, c.weight, {n: t * (B_NAME not in n) for n, t in c.state.items()})
        for c in cohort()
    ]

    assert GlobalState(config(method)).update(1, blank).lora_error == 0.0


def test_an_error_beside_a_mean_that_is_nothing_is_huge() -> None:
    layer, _ = LAYERS
    A, B = torch.ones(RANK, 40), torch.ones(24, RANK)
    plus = {layer + A_NAME: A, layer + B_NAME: B}
    minus = {layer + A_NAME: 2 * A, layer + B_NAME: -B / 2}

    report = GlobalState(config()).update(
        1, [Contribution("a", 1, plus), Contribution("b", 1, minus)]
    )

    assert report.lora_error is not None
    assert report.lora_error > 1e10


@pytest.mark.parametrize("weights", [(), (0.0, 0.0), (-1.0, 2.0), (float("nan"), 1.0)])
def test_unusable_weights_are_refused(weights: tuple[float, ...]) -> None:
    given = [Contribution(str(k), w, {"w": torch.ones(1)}) for k, w in enumerate(weights)]

    with pytest.raises(ValueError, match=r"nothing to average|weights must be"):
        GlobalState(config()).update(1, given)


# ---- server optimizers ------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["factors", "ffa"])
def test_a_server_optimizer_moves_what_is_held(method: str) -> None:
    how = config(method, optimizer="fedavgm", lr=0.5, momentum=0.6)
    state, (start, *_) = GlobalState(how), suited(method, 7)
    state.start(start.state)
    value, pull = {n: t.double() for n, t in start.state.items()}, dict[str, Tensor]()

    for round in (1, 2, 3):
        contributions = suited(method, round)
        report = state.update(round, contributions)
        for name in value:
            mean = mean_of([c.state[name] for c in contributions])
            pull[name] = 0.6 * pull.get(name, torch.zeros(())) + (mean - value[name])
            value[name] = value[name] + 0.5 * pull[name]

    found = state.tensors(everything, RANK)
    assert all(tensor.dtype == torch.float32 for tensor in found.values())
    for name, expected in value.items():
        torch.testing.assert_close(found[name].double(), expected, rtol=1e-5, atol=1e-5)
    plain = GlobalState(config(method)).update(3, contributions).lora_error
    assert report.lora_error == pytest.approx(plain, rel=1e-3, abs=1e-7)


def test_a_server_optimizer_is_part_of_the_snapshot() -> None:
    how = config(optimizer="fedadam", lr=0.1)
    state = GlobalState(how)
    state.start(random_state(0, RANK))
    state.update(1, cohort())
    kept = state.state_dict()
    state.update(2, cohort(seed=1))
    expected = state.tensors(everything, RANK)
    other = GlobalState(how)

    for again in (state, other):
        again.load_state_dict(kept)
        again.update(2, cohort(seed=1))
        assert same(again.tensors(everything, RANK), expected)


def test_a_new_start_forgets_what_was_added() -> None:
    state, initial = GlobalState(config("exact")), random_state(0, RANK)
    state.update(1, cohort())

    state.start(initial)

    assert same(state.tensors(everything, RANK), initial)


def test_a_new_start_forgets_the_moments() -> None:
    results = []
    state = GlobalState(config(optimizer="fedadam", lr=0.1))
    for _ in range(2):
        state.start(random_state(0, RANK))
        state.update(1, cohort())
        results.append(state.tensors(everything, RANK))

    assert same(*results)


def test_a_server_optimizer_without_a_start_is_refused() -> None:
    with pytest.raises(ValueError, match="start the state first"):
        GlobalState(config(optimizer="fedyogi")).update(1, cohort())


def test_a_snapshot_of_another_configuration_is_refused() -> None:
    state = GlobalState(config(optimizer="fedavgm"))
    state.start(random_state(0, RANK))
    state.update(1, cohort())

    with pytest.raises(ValueError, match=r"no part of a state with .*optimizer=fedavg$"):
        GlobalState(config()).load_state_dict(state.state_dict())
