"""Invariant 3: `merged` with every client present is centralised training, and it never waits long.

The reference (`simulations.equality.reference`) is plain PyTorch on the unsplit model.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from conf.schema import TrainConfig
from flower_app.client import streamed
from flower_app.data.client import Batch
from models import client_state, load_client_state, named_trainable, split
from simulations.equality.local_link import LocalLink
from simulations.equality.reference import centralised_round, plain_optimizer
from strategies.aggregate.means import weighted_mean
from strategies.engine.engine import TrunkEngine
from strategies.engine.policies.batches import MAX_PADDING, buckets
from strategies.engine.policies.merged import Merged
from strategies.engine.session import Session
from strategies.errors import TrunkError
from tests.strategies.helpers import (
    CUT,
    HIDDEN,
    connect,
    engine_for,
    largest_difference,
    place,
    random_batch,
    random_steps,
    served,
    tiny_model,
    twin,
)

Steps = Sequence[Sequence[Batch]]


def settings(**changes: Any) -> TrainConfig:
    values = {"strategy": "merged", "optimizer": "sgd", "lr": 0.1, "clip": 0.0, **changes}
    return TrainConfig(**values)  # type: ignore[arg-type]


class Federation:
    """A model cut into a common trunk and one pair of ends for each client."""

    def __init__(self, model: PreTrainedModel, train: TrainConfig, clients: int) -> None:
        self.train = train
        self.parts = split(model, CUT)
        self.engine: TrunkEngine = engine_for(self.parts.trunk, train, timeout=20.0)
        self.ends = [split(twin(model), CUT) for _ in range(clients)]
        if train.sync == "step":
            policy = self.engine.policy
            assert isinstance(policy, Merged)
            policy.start_ends(client_state(self.parts.bottom, self.parts.top))

    @staticmethod
    def order(clients: int) -> Sequence[int]:
        return range(clients)

    def round(self, cohort: Sequence[Steps], number: int = 1, rounds: int = 1) -> None:
        self.engine.open_round(number, rounds, training=True, cohort=len(cohort))
        links = [
            LocalLink(self.engine.open(f"{i}", client=f"client-{i}", steps=len(cohort[i])))
            for i in self.order(len(cohort))
        ]
        links.sort(key=lambda link: link._session.client)

        def work(client: int) -> int:
            own, steps = self.ends[client], cohort[client]
            here = place(f"client-{client}", number, rounds)
            try:
                done = streamed.train(
                    own.bottom, own.top, links[client], steps, len(steps), self.train, here
                )
            finally:
                links[client].close()
            return done.tokens

        with ThreadPoolExecutor(len(cohort)) as pool:
            tokens = list(pool.map(work, range(len(cohort))))
        self.engine.close_round()
        states = [client_state(own.bottom, own.top) for own in self.ends]
        mean = weighted_mean(states, tokens)
        for own in (*self.ends, self.parts):
            load_client_state(own.bottom, own.top, mean)


def cohort_of(clients: int, steps: int, seed: int, **changes: Any) -> list[Steps]:
    """Clients of unequal batch sizes, lengths and padding."""
    return [
        random_steps(
            steps, seed=seed + 1000 * client, padding=("left", "right", "")[client], **changes
        )
        for client in range(clients)
    ]


def compared(
    train: TrainConfig, *, family: str = "llama", rounds: int = 2, steps: int = 10
) -> float:
    """Largest difference of any weight between merged and centralised training."""
    model = tiny_model(family, tie_word_embeddings=True)
    whole, first = twin(model), twin(model)
    federation = Federation(model, train, clients=3)
    optimizer = plain_optimizer(whole, train)
    for number in range(1, rounds + 1):
        cohort = cohort_of(3, steps, seed=17 * number, accumulate=train.accumulate)
        federation.round(cohort, number, rounds)
        centralised_round(whole, cohort, train, number, rounds, optimizer=optimizer)
    assert largest_difference(whole, first) > 1e-2
    return largest_difference(model, whole)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(
    ("changes", "tolerance"),
    [
        ({}, 1e-5),
        ({"clip": 0.1, "lr": 0.5}, 1e-5),
        ({"momentum": 0.9, "weight_decay": 0.01, "lr": 0.05, "schedule": "cosine"}, 1e-5),
        ({"accumulate": 3}, 1e-5),
        # AdamW divides by the root of the second moment, which magnifies rounding.
        ({"optimizer": "adamw", "lr": 3e-3, "clip": 1.0, "weight_decay": 0.01}, 2e-4),
    ],
    ids=["sgd", "clipped", "momentum", "accumulate", "adamw"],
)
def test_merged_with_common_ends_is_centralised_training(
    family: str, changes: dict[str, Any], tolerance: float
) -> None:
    """Twenty steps in two rounds; the optimizers live through both."""
    assert compared(settings(sync="step", **changes), family=family) < tolerance


def test_the_trunk_alone_learns_as_in_centralised_training() -> None:
    """With frozen ends nothing is left to synchronise: `sync=round` is exact too."""
    train = settings(clip=0.1, lr=0.5)
    model = tiny_model()
    whole = twin(model)
    for name, parameter in [*model.named_parameters(), *whole.named_parameters()]:
        parameter.requires_grad_(".layers.1." in name or ".layers.2." in name)
    federation = Federation(model, train, clients=3)
    optimizer = plain_optimizer(whole, train)
    cohort = cohort_of(3, 20, seed=5)

    federation.round(cohort)
    centralised_round(whole, cohort, train, 1, 1, optimizer=optimizer)

    assert largest_difference(model, tiny_model()) > 1e-2
    assert largest_difference(model, whole) < 1e-5


def test_ends_averaged_by_round_drift_apart_from_centralised_training() -> None:
    """The comparison above would see it: it is not equal by being blind."""
    assert compared(settings(sync="round"), rounds=1) > 1e-3


def test_a_step_in_which_a_client_has_no_example() -> None:
    """Global sampling may give a client nothing in a step; it still moves with the others."""
    train = settings(sync="step")
    model = tiny_model()
    whole = twin(model)
    federation = Federation(model, train, clients=3)
    cohort = [list(steps) for steps in cohort_of(3, 6, seed=3)]
    cohort[1][2] = cohort[1][4] = cohort[2][4] = []

    federation.round(cohort)
    centralised_round(whole, cohort, train, 1, 1, optimizer=plain_optimizer(whole, train))

    assert largest_difference(model, whole) < 1e-5
    own = [named_trainable(e.bottom, e.top) for e in federation.ends]
    assert all(torch.equal(own[0][n], own[1][n]) for n in own[0])


def test_the_order_of_arrival_changes_no_bit() -> None:
    results = []
    for order in ((0, 1, 2), (2, 0, 1)):
        model = tiny_model()
        federation = Federation(model, settings(sync="step"), clients=3)
        federation.order = lambda clients, order=order: order  # type: ignore[method-assign]
        federation.round(cohort_of(3, 3, seed=9))
        results.append(model)

    assert largest_difference(*results) == 0


@pytest.mark.parametrize("sync", ["step", "round"])
def test_clients_may_have_different_numbers_of_micro_batches(sync: str) -> None:
    """A batch may be the last of a step for one client and not for another; it goes back once."""
    train = settings(sync=sync, accumulate=3)
    model = tiny_model()
    if sync == "round":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".layers.1." in name or ".layers.2." in name)
    whole = twin(model)
    federation = Federation(model, train, clients=3)
    cohort = [
        [batches[: 1 + (step + client) % 3] for step, batches in enumerate(steps)]
        for client, steps in enumerate(cohort_of(3, 6, seed=3, accumulate=3))
    ]

    federation.round(cohort)
    centralised_round(whole, cohort, train, 1, 1, optimizer=plain_optimizer(whole, train))

    assert largest_difference(model, whole) < 1e-5


def test_clients_with_fewer_steps_leave_and_the_rest_go_on() -> None:
    train = settings(sync="step")
    model = tiny_model()
    whole = twin(model)
    federation = Federation(model, train, clients=3)
    cohort = [steps[: 2 + 2 * i] for i, steps in enumerate(cohort_of(3, 6, seed=3))]

    federation.round(cohort)
    centralised_round(whole, cohort, train, 1, 1, optimizer=plain_optimizer(whole, train))

    trunk, reference = split(model, CUT).trunk, split(whole, CUT)
    assert largest_difference(trunk, reference.trunk) < 1e-5
    policy = federation.engine.policy
    assert isinstance(policy, Merged)
    want = client_state(reference.bottom, reference.top)
    ends = policy.ends()
    assert max(float((ends[name] - want[name]).abs().max()) for name in want) < 1e-5


H = torch.randn(2, 5, HIDDEN, generator=torch.Generator().manual_seed(0))


def open_two(timeout: float = 20.0, cohort: int = 2) -> tuple[TrunkEngine, list[Session]]:
    engine = engine_for(split(tiny_model(), CUT).trunk, settings(), timeout=timeout)
    engine.open_round(1, 1, training=True, cohort=cohort)
    return engine, [engine.open(name, client=name, steps=3) for name in "ab"]


def test_a_session_that_dies_while_others_wait_sets_them_free() -> None:
    _, (one, other) = open_two()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(one.compute, 0, 0, H, None)
        time.sleep(0.1)
        assert not waiting.done()
        other.leave()
        assert waiting.result(timeout=5).shape == H.shape
    alone = engine_for(split(tiny_model(), CUT).trunk, settings(strategy="splitfed-v1"))
    alone.open_round(1, 1, training=True)
    expected = alone.open("a", steps=1).compute(0, 0, H, None)
    assert torch.allclose(waiting.result(), expected, atol=1e-6)


def test_the_end_of_the_round_frees_a_waiting_session_with_words() -> None:
    engine, (one, _) = open_two()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(one.compute, 0, 0, H, None)
        time.sleep(0.1)
        engine.close_round()
        with pytest.raises(TrunkError, match="the session has ended"):
            waiting.result(timeout=5)


def test_a_client_that_died_after_its_forward_adds_nothing() -> None:
    """Its rows get no gradient; the others' step is the one they would have taken alone."""
    engine, (one, other) = open_two()
    alone = engine_for(split(tiny_model(), CUT).trunk, settings())
    alone.open_round(1, 1, training=True, cohort=1)
    lonely = alone.open("a", client="a", steps=3)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda s: s.compute(0, 0, H, None), (one, other)))
        other.leave()
        for session in (one, lonely):
            session.compute(0, 0, H, None) if session is lonely else None
            session.backward(0, 0, H, last=True, tokens=8)
            session.apply(0, client_square_norm=1.0, tokens=8)
    assert largest_difference(engine.trunk, alone.trunk) < 1e-6


def test_nobody_waits_for_a_cohort_that_does_not_come(caplog: pytest.LogCaptureFixture) -> None:
    """One client at a time, as in Flower's default simulation: a warning with the remedy."""
    engine = engine_for(split(tiny_model(), CUT).trunk, settings(), timeout=0.4)
    engine.open_round(1, 1, training=True, cohort=5)
    session = engine.open("a", client="a", steps=3)
    started = time.monotonic()
    with caplog.at_level(logging.WARNING):
        session.compute(0, 0, H, None)
    assert 0.15 < time.monotonic() - started < 3
    assert "1 of 5 clients" in caplog.text
    assert "link.transport=messages" in caplog.text
    started = time.monotonic()
    session.backward(0, 0, H, last=True, tokens=8)
    assert time.monotonic() - started < 0.15, "the wait is once a round"


def test_the_first_step_waits_for_those_still_to_come() -> None:
    engine, (one, other) = open_two(cohort=3)
    with ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(s.compute, 0, 0, H, None) for s in (one, other)]
        time.sleep(0.2)
        assert not any(w.done() for w in waiting)
        third = engine.open("c", client="c", steps=3)
        waiting.append(pool.submit(third.compute, 0, 0, H, None))
        for reply in waiting:
            assert reply.result(timeout=5).shape == H.shape


def test_one_clients_nonsense_does_not_reach_the_others() -> None:
    _, (one, other) = open_two()
    with ThreadPoolExecutor(2) as pool:
        good = pool.submit(one.compute, 0, 0, H, None)
        with pytest.raises(TrunkError, match="not finite"):
            other.compute(0, 0, H * float("nan"), None)
        other.leave()
        assert torch.isfinite(good.result(timeout=5)).all()


def test_tokens_weigh_gradients_so_they_must_be_the_same_to_the_end() -> None:
    _, (one, other) = open_two()
    other.leave()
    one.compute(0, 0, H, None)
    with pytest.raises(TrunkError, match="tokens cannot be weighed"):
        one.backward(0, 0, H, last=True, tokens=2**40)
    one.backward(0, 0, H, last=True, tokens=8)
    with pytest.raises(TrunkError, match="ends with 9 tokens, it began with 8"):
        one.apply(0, client_square_norm=1.0, tokens=9)


@pytest.mark.parametrize("lengths", [[128] * 8, [128, 8, 8, 8], [128, 120, 64, 60, 9, 8], [5]])
def test_padding_is_bounded(lengths: list[int]) -> None:
    items = [(4, length) for length in lengths]
    groups = buckets(items, lambda item: item)

    assert sorted(length for group in groups for _, length in group) == sorted(lengths)
    for group in groups:
        room = sum(b for b, _ in group) * max(t for _, t in group)
        assert 1 - sum(b * t for b, t in group) / room <= MAX_PADDING
    assert len(buckets([(4, 128)] * 8, lambda item: item)) == 1


def test_padding_is_reported() -> None:
    engine, (one, other) = open_two()
    with ThreadPoolExecutor(2) as pool:
        tall = torch.randn(2, 4, HIDDEN)
        list(pool.map(lambda pair: pair[0].compute(0, 0, pair[1], None), ((one, H), (other, tall))))
    assert isinstance(engine.policy, Merged)
    assert engine.policy.statistics() == {"padding": pytest.approx(2 / 20)}


def test_a_revoked_round_leaves_nothing() -> None:
    train = settings(sync="step", optimizer="adamw", lr=1e-2)
    once, twice = tiny_model(), tiny_model()
    straight, revoked = Federation(once, train, 2), Federation(twice, train, 2)
    for number in (1, 2):
        cohort = cohort_of(2, 3, seed=number)
        straight.round(cohort, number, 2)
        if number == 2:  # a first attempt of round 2 that is given up
            revoked.engine.open_round(2, 2, training=True, cohort=1, revocable=True)
            session = revoked.engine.open("x", client="x", steps=1)
            session.compute(0, 0, H, None)
            session.backward(0, 0, H, last=True, tokens=8)
            ends = revoked.engine.policy.ends()
            gradients = {n: torch.ones_like(p) for n, p in ends.items()}
            session.apply(0, client_square_norm=1.0, tokens=8, gradients=gradients)
            assert largest_difference(once, twice) > 0
            revoked.engine.abandon_round()
        revoked.round(cohort, number, 2)

    assert largest_difference(once, twice) == 0


def test_over_grpc_it_is_the_same(one_thread: None) -> None:
    """Threads of gRPC meet as those of this process do; a killed client is noticed at once."""
    train = settings(sync="step")
    cohort = cohort_of(2, 4, seed=21)
    local, remote = tiny_model(), tiny_model()
    Federation(local, train, 2).round(cohort)
    federation = Federation(remote, train, 2)
    federation.engine.open_round(1, 1, training=True, cohort=3)
    with served(federation.engine) as service:
        dead = connect(service, "client-9", 4)
        threading.Timer(0.5, dead.abort).start()

        def work(client: int) -> None:
            own, steps = federation.ends[client], cohort[client]
            link = connect(service, f"client-{client}", len(steps))
            here = place(f"client-{client}")
            streamed.train(own.bottom, own.top, link, steps, len(steps), train, here)
            link.close()

        started = time.monotonic()
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(work, range(2)))
        assert time.monotonic() - started < 10
    federation.engine.close_round()
    state = client_state(federation.ends[0].bottom, federation.ends[0].top)
    load_client_state(federation.parts.bottom, federation.parts.top, state)

    assert largest_difference(local, remote) == 0


def test_foreign_gradients_are_refused() -> None:
    train = settings(sync="step")
    federation = Federation(tiny_model(), train, 1)
    federation.engine.open_round(1, 1, training=True, cohort=1)
    session = federation.engine.open("a", client="a", steps=1)
    session.compute(0, 0, H, None)
    session.backward(0, 0, H, last=True, tokens=8)
    with pytest.raises(TrunkError, match="differ from the clients' common tensors"):
        session.apply(0, client_square_norm=1.0, tokens=8, gradients={"x": torch.ones(1)})


def test_batches_are_random() -> None:
    """Guards the guard: unequal lengths and sizes are what the equalities above are shown on."""
    shapes = {
        batch.input_ids.shape
        for steps in cohort_of(3, 4, seed=1, accumulate=3)
        for s in steps
        for batch in s
    }
    assert len(shapes) > 2
    assert random_batch(1, padding="left").attention_mask[0, 0] == 0
