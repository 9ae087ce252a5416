"""Clients of different cuts: `splitfed-v1` stays FedAvg of the unsplit model, layer by layer."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from conf.schema import AggregationConfig, Config, LoraSettings, TrainConfig
from flower_app.client import streamed
from flower_app.data.client import Batch
from models import (
    Cut,
    Part,
    Parts,
    client_state,
    fold_residuals,
    in_ends,
    load_client_state,
    merge,
    narrow,
    split,
    trainable_state,
    tune,
    tune_whole,
)
from simulations.equality.local_link import LocalLink
from strategies.aggregate.means import weighted_mean
from strategies.aggregate.state import Contribution, GlobalState
from strategies.engine.engine import TrunkEngine
from strategies.engine.member import Member, Round
from strategies.engine.policy import Policy
from strategies.errors import TrunkError
from tests.strategies.helpers import (
    engine_for,
    fed_avg_round,
    largest_difference,
    place,
    random_steps,
    tiny_model,
    twin,
)

BLOCKS = 5
FEWEST = Cut(1, 1)
CUTS = (Cut(1, 1), Cut(2, 1), Cut(1, 2))
ROUNDS = 2
TOLERANCE = {"adamw": 5e-5, "sgd": 2e-6}
"""fp32; AdamW divides by the root of the second moment, which magnifies rounding."""
STRAYED = 1e-3
"""What a wrong mean is off by, at least; so is what training moves."""


def settings(optimizer: str, **changes: object) -> TrainConfig:
    lr = 1e-2 if optimizer == "adamw" else 0.3
    values = {"lr": lr, "clip": 0.5, "accumulate": 2, "schedule": "cosine", **changes}
    return TrainConfig(optimizer=optimizer, **values)  # type: ignore[arg-type]


def tuned_model(mode: str, family: str = "llama") -> PreTrainedModel:
    """A tied model of five blocks of which everything, or adapters in all blocks, is trained."""
    model = tiny_model(family, num_hidden_layers=BLOCKS, tie_word_embeddings=True)
    return tune_whole(model, mode, lora=LoraSettings(rank=4), seed=3)


def cohort_of(round: int) -> list[list[list[Batch]]]:
    """Steps of three clients of unequal size."""
    return [
        random_steps(2 + client, seed=1000 * round + 10 * client, accumulate=1 + client % 2)
        for client in range(len(CUTS))
    ]


def mixed_round(
    model: PreTrainedModel,
    cohort: Sequence[Sequence[Sequence[Batch]]],
    train: TrainConfig,
    round: int,
) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]], list[int]]:
    """Each client trains at its own cut; returns ends, trunk replicas and tokens by client."""
    trunk = split(model, FEWEST).trunk
    engine = engine_for(trunk, train)
    engine.open_round(round, ROUNDS, training=True)
    ends, tokens = [], []
    for client, (cut, steps) in enumerate(zip(CUTS, cohort, strict=True)):
        name = str(client)
        own = split(twin(model), cut)
        link = LocalLink(engine.open(name, client=name, steps=len(steps), cut=cut))
        here = place(name, round, ROUNDS)
        outcome = streamed.train(own.bottom, own.top, link, steps, len(steps), train, here)
        ends.append(client_state(own.bottom, own.top))
        tokens.append(outcome.tokens)
    replicas = list(engine.policy.states(str(c) for c in range(len(CUTS))).values())
    return ends, replicas, tokens


def everywhere(
    ends: list[dict[str, Tensor]], replicas: list[dict[str, Tensor]], tokens: list[int]
) -> dict[str, Tensor]:
    """The mean of each layer over all replicas of it, wherever they ran."""
    states = [{**end, **replica} for end, replica in zip(ends, replicas, strict=True)]
    return weighted_mean(states, tokens)


def in_one_place(
    first: list[dict[str, Tensor]], second: list[dict[str, Tensor]], tokens: list[int]
) -> dict[str, Tensor]:
    """The mean over those who hold a layer in the `first` place, `second` where nobody does."""
    mean: dict[str, Tensor] = {}
    for places in (first, second):
        for name in {name for state in places for name in state} - mean.keys():
            held = [(s[name], w) for s, w in zip(places, tokens, strict=True) if name in s]
            mean |= weighted_mean([{name: tensor} for tensor, _ in held], [w for _, w in held])
    return mean


def load(model: PreTrainedModel, mean: dict[str, Tensor]) -> None:
    own = trainable_state(model)
    assert own.keys() == mean.keys()
    for name, tensor in own.items():
        tensor.copy_(mean[name])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("mode", ["full", "lora"])
def test_three_cuts_equal_fedavg_of_unsplit_models(mode: str, optimizer: str, family: str) -> None:
    model, train = tuned_model(mode, family), settings(optimizer)
    whole = twin(model)
    for round in range(1, ROUNDS + 1):
        cohort = cohort_of(round)
        load(model, everywhere(*mixed_round(model, cohort, train, round)))
        fed_avg_round(whole, cohort, train, round, ROUNDS)

    assert largest_difference(model, whole) < TOLERANCE[optimizer]
    assert largest_difference(model, tuned_model(mode, family)) > STRAYED


@pytest.mark.parametrize("place", ["ends", "trunk replicas"])
@pytest.mark.parametrize("mode", ["full", "lora"])
def test_a_mean_over_one_place_alone_is_caught(mode: str, place: str) -> None:
    """A layer at client 0's trunk and client 1's bottom belongs to both."""
    model, train = tuned_model(mode), settings("sgd")
    whole, cohort = twin(model), cohort_of(1)
    ends, replicas, tokens = mixed_round(model, cohort, train, 1)
    fed_avg_round(whole, cohort, train, 1, ROUNDS)

    both = (ends, replicas) if place == "ends" else (replicas, ends)
    load(model, in_one_place(*both, tokens))

    assert largest_difference(model, whole) > STRAYED


def policy_of(trunk: Part, train: TrainConfig) -> Policy:
    return engine_for(trunk, train).policy


def member(*, training: bool = True) -> Member:
    return Member(client="a", steps=1, round=Round(number=1, rounds=1, training=training))


def test_a_replica_holds_the_blocks_between_the_ends_alone() -> None:
    trunk = split(tuned_model("lora"), FEWEST).trunk
    policy = policy_of(trunk, settings("adamw"))
    shared = {id(p) for p in trunk.parameters()}

    lane = policy.open("one", member(), Cut(2, 1))

    state = policy.states(["one"])["one"]
    assert {name.split(".")[2] for name in state} == {"2", "3"}
    own = [p for p in lane.module.parameters() if id(p) not in shared]
    assert {id(p) for p in own} == {id(p) for p in lane.parameters}
    assert len(own) == len(state)


def test_evaluation_runs_the_trunk_itself_between_the_ends() -> None:
    model = tuned_model("full").eval()
    parts, own = split(model, FEWEST), split(model, Cut(2, 2))
    engine = engine_for(parts.trunk, settings("sgd"))
    engine.open_round(0, ROUNDS, training=False)
    session = engine.open("one", client="one", cut=Cut(2, 2))
    batch = random_steps(1, seed=4)[0][0]
    with torch.no_grad():
        h = session.compute(
            0, 0, own.bottom(batch.input_ids, batch.attention_mask), batch.attention_mask
        )
        logits = own.top(h, batch.attention_mask)
        want = model(batch.input_ids, attention_mask=batch.attention_mask).logits
    real = batch.attention_mask.bool()
    torch.testing.assert_close(logits[real], want[real], rtol=0, atol=1e-5)


def test_what_was_averaged_is_loaded_strictly_and_lanes_are_forgotten() -> None:
    trunk = split(tuned_model("full"), FEWEST).trunk
    policy = policy_of(trunk, settings("sgd"))
    policy.open("one", member(), Cut(2, 1))
    state = {name: tensor + 1.0 for name, tensor in trainable_state(trunk).items()}
    name = next(iter(state))
    for wrong, words in (
        ({n: t for n, t in state.items() if n != name}, f"missing {name}"),
        ({**state, "lm_head.weight": torch.zeros(2)}, "unexpected lm_head"),
        ({**state, name: state[name][:1]}, "must be"),
    ):
        with pytest.raises(ValueError, match=words):
            policy.load(wrong)
    policy.load(state)
    assert all(torch.equal(tensor, state[n]) for n, tensor in trainable_state(trunk).items())
    policy.forget()
    with pytest.raises(ValueError, match=r"no trunk replica for sessions \['one'\]"):
        policy.states(["one"])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("cut", "words"),
    [
        (Cut(0, 1), "keep at least 1 below and 1 above"),
        (Cut(1, 0), "keep at least 1 below and 1 above"),
        (Cut(3, 2), "leaves no trunk: the model has 5 blocks"),
    ],
)
def test_a_cut_that_the_trunk_cannot_serve_is_refused(cut: Cut, words: str, training: bool) -> None:
    policy = policy_of(split(tuned_model("full"), FEWEST).trunk, settings("sgd"))
    with pytest.raises(TrunkError, match=words):
        policy.open("one", member(training=training), cut)


def test_one_trunk_for_all_has_one_cut_for_all() -> None:
    trunk = split(tuned_model("full"), FEWEST).trunk
    policy = policy_of(trunk, settings("sgd", strategy="splitfed-v2"))
    with pytest.raises(TrunkError, match="Use train.strategy=splitfed-v1, or take cut-bottom"):
        policy.open("one", member(), Cut(2, 1))
    assert policy.open("two", member(), FEWEST).module is trunk
    assert policy.states(["two"]) == {"two": {}}


def test_a_trunk_without_blocks_to_leave_out_says_so() -> None:
    engine = TrunkEngine(torch.nn.Linear(4, 4), hidden_size=4, train=settings("sgd"))
    engine.open_round(1, 1, training=True)
    with pytest.raises(TrunkError, match="no blocks to leave out"):
        engine.open("one", client="one", steps=1, cut=Cut(2, 1))


def adapted_parts(cut: Cut, rank: int) -> Parts:
    """Parts of one and the same five-block model with adapters of a client's own rank."""
    parts = split(tiny_model("gpt2", num_hidden_layers=BLOCKS), cut)
    for part in parts:
        tune(part, "lora", lora=LoraSettings(rank=rank), seed=3)
    return parts


def effective(parts: Sequence[Part]) -> dict[str, Tensor]:
    """Weights of the adapted layers with their adapters merged into them, in float64."""
    found = {}
    for part in parts:
        own = copy.deepcopy(part).double()
        layers = {n.partition(".lora_")[0] for n in trainable_state(part)}
        merge(own)
        found |= {n: own.model.get_submodule(n).weight.detach() for n in layers}
    return found


def test_mixed_cuts_and_ranks_meet_in_one_model() -> None:
    """Under aggregation.lora=exact all clients go on with the mean of what adapters add."""
    config = Config(lora=LoraSettings(rank=4), aggregation=AggregationConfig(lora="exact"))
    ranks, train = (4, 2, 6), settings("adamw")
    clients = [adapted_parts(cut, rank) for cut, rank in zip(CUTS, ranks, strict=True)]
    bases = [[copy.deepcopy(p) for p in (c.bottom, c.top)] for c in clients]
    trunk, served, state = adapted_parts(FEWEST, 4).trunk, {}, GlobalState(config)
    form = {"block_list": trunk.block_list, "num_blocks": BLOCKS}
    for round in (1, 2):
        engine = engine_for(trunk, train)
        engine.open_round(round, ROUNDS, training=True)
        given, wholes = [], []
        for number, (cut, steps) in enumerate(zip(CUTS, cohort_of(round), strict=True)):
            own, name = clients[number], str(number)
            session = engine.open(name, client=name, steps=len(steps), cut=cut)
            here = place(name, round, ROUNDS)
            link = LocalLink(session)
            out = streamed.train(own.bottom, own.top, link, steps, len(steps), train, here)
            replica = engine.policy.states([name])[name]
            given.append(
                Contribution(name, out.tokens, {**client_state(own.bottom, own.top), **replica})
            )
            wholes.append(effective([own.bottom, session._lane.module, own.top]))
        mean = weighted_mean(wholes, [g.weight for g in given])

        state.update(round, given)
        engine.policy.forget()
        engine.close_round()

        for number, (cut, rank) in enumerate(zip(CUTS, ranks, strict=True)):
            sent = state.tensors(lambda n, c=cut: in_ends(n, cut=c, **form), rank)
            bottom, top = (copy.deepcopy(part) for part in bases[number])
            load_client_state(bottom, top, without_residuals(sent))
            fold_residuals((bottom, top), residuals_of(sent))
            clients[number] = Parts(bottom, clients[number].trunk, top)
        sent = state.tensors(lambda n: not in_ends(n, cut=FEWEST, **form), 4)
        engine.policy.load(without_residuals(sent))
        fold_residuals(trunk, {n: t - served.get(n, 0) for n, t in residuals_of(sent).items()})
        served = residuals_of(sent)

        for own, cut in zip(clients, CUTS, strict=True):
            now = effective([own.bottom, narrow(trunk, cut), own.top])
            assert now.keys() == mean.keys()
            gap = max(float((now[name] - mean[name]).abs().max()) for name in mean)
            assert gap < 1e-6, f"round {round}, cut {cut}"


def residuals_of(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if name.endswith(".residual")}


def without_residuals(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if not name.endswith(".residual")}
