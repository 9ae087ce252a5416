"""What is recorded is what crossed: of the right step, of the right ends, after the codec."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from simulations.audit.observation import CLIENT, EXACT, SERVER, STALE, START
from simulations.audit.recording import Recording, Scope
from tests.simulations.audit.conftest import SCOPE, record, small


def test_h1_is_that_of_the_steps_own_bottom(recording: Recording) -> None:
    for client in recording.clients:
        (crossed,), (batch,) = client.observation.crossed, client.truth.batches
        found = {}
        for level in (EXACT, STALE, START):
            bottom, _ = recording.knowledge(client, level).ends(crossed)
            with torch.no_grad():
                found[level] = bottom(batch.input_ids, batch.attention_mask)
        assert crossed.h1_BTD is not None
        real_BT = batch.attention_mask.bool()
        # Three rows fewer are computed here: not to the bit.
        torch.testing.assert_close(found[EXACT][real_BT], crossed.h1_BTD[real_BT])
        for level in (STALE, START):
            assert (found[level] - crossed.h1_BTD)[real_BT].norm() > 1e-3


def test_every_crossing_is_recorded_and_belongs_together(recording: Recording) -> None:
    client = recording.clients[0]
    (crossed,), (batch,) = client.observation.crossed, client.truth.batches
    _, top = recording.knowledge(client, EXACT).ends(crossed)
    assert crossed.h2_BTD is not None
    assert crossed.grad_h2_BTD is not None
    assert crossed.grad_h1_BTD is not None
    h2_BTD = crossed.h2_BTD.clone().requires_grad_()
    logits_BTV = top(h2_BTD, batch.attention_mask)
    loss = torch.nn.functional.cross_entropy(
        logits_BTV[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), reduction="sum"
    )
    (grad_BTD,) = torch.autograd.grad(loss / crossed.tokens, h2_BTD)
    torch.testing.assert_close(grad_BTD, crossed.grad_h2_BTD, rtol=1e-3, atol=1e-6)


def test_what_is_recorded_has_been_through_the_codec() -> None:
    plain, coarse = (record(small(f"link.codec={codec}")) for codec in ("fp32", "int2"))
    one, other = (each.clients[0].observation.crossed[0].h1_BTD for each in (plain, coarse))
    assert one is not None
    assert other is not None
    assert (one - other).norm() > 0.1 * one.norm()


def test_clients_end_apart_and_begin_together(recording: Recording) -> None:
    one, other = (client.observation for client in recording.clients)
    name = next(name for name in one.start if "embed" in name)
    assert torch.equal(one.start[name], other.start[name])
    assert not torch.equal(one.end[name], other.end[name])
    assert not torch.equal(one.start[name], recording.first[name])


def test_members_were_trained_on_and_strangers_were_not(recording: Recording) -> None:
    for client in recording.clients:
        members = {tuple(each.input_ids.tolist()) for each in client.truth.members}
        strangers = {tuple(each.input_ids.tolist()) for each in client.truth.strangers}
        attacked = {
            tuple(ids[mask.bool()].tolist())
            for batch in client.truth.batches
            for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True)
        }
        assert attacked <= members
        assert strangers
        assert not strangers & members


@pytest.mark.parametrize("clients", [2, 3])
def test_a_client_sees_what_is_left_of_the_average_without_its_share(clients: int) -> None:
    """With two clients the other's ends; with three the others' mean; of crossings nothing."""
    recording = record(small("data.partitioner=linear"), replace(SCOPE, clients=clients))
    name = next(name for name in recording.round_start if "embed" in name)
    seen = recording.seen_by(CLIENT)
    assert len(seen) == clients * (clients - 1)
    first, *others = recording.clients
    weights = [each.weight for each in others]
    mean = sum(
        weight / sum(weights) * each.observation.end[name]
        for weight, each in zip(weights, others, strict=True)
    )
    for view, other in zip(seen, others, strict=False):
        assert view.truth is other.truth
        torch.testing.assert_close(view.observation.end[name], mean, rtol=1e-6, atol=1e-6)
        assert (view.observation.end[name] - first.observation.end[name]).norm() > 1e-3
        assert not view.observation.crossed
        trunk = view.observation.trunk_end
        assert all(torch.equal(trunk[n], recording.trunk_end[n]) for n in trunk)
        # The replica is the server's alone.
        assert any(not torch.equal(trunk[n], other.observation.trunk_end[n]) for n in trunk)
    assert recording.seen_by(SERVER) == recording.clients


def test_with_common_steps_no_client_is_played() -> None:
    config = small("train.strategy=merged", "train.sync=step")
    assert not record(config, Scope(warm=0, steps=1, sequences=1)).seen_by(CLIENT)
