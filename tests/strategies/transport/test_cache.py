"""With `link.cache_mb` h1 crosses once, and h2 as a change; both sides hold the same."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from conf.load import load_config
from conf.rules import ConfigError
from conf.schema import TrainConfig
from conf.sections.link import read_codecs
from flower_app.client import streamed
from flower_app.client.remembered import names_of
from flower_app.data.client import Batch
from models import Parts, split
from simulations.equality.fold import fold
from strategies.engine.engine import TrunkEngine
from strategies.errors import TrunkError
from strategies.transport import trunk_pb2 as pb
from strategies.transport.cache import Cache, ClientCache, TrunkCache
from strategies.transport.codec.registry import crossings
from strategies.transport.codec.tensors import encode_mask
from strategies.transport.frames import client_frame
from strategies.transport.payload import Parcel, Payload
from strategies.transport.stream.link import GrpcLink
from strategies.transport.stream.service import TrunkService
from tests.strategies.helpers import (
    CUT,
    HIDDEN,
    NODE_KEY,
    admit,
    engine_for,
    largest_difference,
    link_config,
    place,
    random_batch,
    served,
    tiny_model,
)

TRAIN = TrainConfig(lr=1e-3, clip=1.0, accumulate=4)
MIB = 8.0


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """See `one_thread`."""


EXAMPLES = random_batch(3, 8, 12, "right")


def some(*rows: int) -> Batch:
    """A batch of examples, padded as far as these need."""
    here = EXAMPLES.attention_mask[list(rows)]
    T = int(here.sum(1).max())
    return Batch(
        input_ids=EXAMPLES.input_ids[list(rows), :T],
        attention_mask=here[:, :T],
        labels=EXAMPLES.labels[list(rows), :T],
    )


def frozen_parts() -> Parts:
    """A model whose bottom learns nothing."""
    parts = split(tiny_model("llama"), CUT)
    parts.bottom.requires_grad_(False)
    return parts


class Site:
    """One client and its trunk, for as many rounds as are asked for."""

    def __init__(self, codec: str, cache_mb: float = MIB) -> None:
        self.parts, self.link = frozen_parts(), {"codec": read_codecs(codec), "cache_mb": cache_mb}
        self.engine: TrunkEngine = engine_for(self.parts.trunk, TRAIN)
        self.cache = Cache(int(cache_mb * 2**20))
        self.round = 0

    def train(
        self, service: TrunkService, steps: Sequence[Sequence[Batch]], window: int = 4
    ) -> int:
        """Train a round; returns the bytes that went up and down."""
        self.round += 1
        self.engine.open_round(self.round, 9, training=True)
        key = f"round-{self.round}"
        ticket = replace(admit(service, key), seed=7)
        here = replace(place("client-0"), secret=b"only this client's" if self.cache else b"")
        link = GrpcLink(
            ticket,
            NODE_KEY,
            steps=len(steps),
            config=link_config(**self.link),
            cache=self.cache if self.link["cache_mb"] else None,
        )
        bottom, top = self.parts.bottom, self.parts.top
        if not self.link["cache_mb"]:
            here = replace(here, secret=b"")
        streamed.train(bottom, top, link, steps, len(steps), TRAIN, here, window=window)
        link.close()
        fold(self.engine, {key: 1.0})
        return link.bytes_up + link.bytes_down


EPOCHS = (
    [[some(0, 1), some(2, 3)], [some(4, 5)], [some(6, 7)]],
    [[some(5, 2), some(7, 0)], [some(1, 6)], [some(3, 4)]],
    [[some(7, 6, 5)], [some(4, 3, 2)], [some(1, 0)]],
)
"""The examples come with others, and with other padding, each time."""


def service_of(site: Site) -> object:
    """The site's trunk behind real gRPC. Its sessions are one client's, whatever their name."""
    return served(site.engine, **site.link)


@pytest.fixture(autouse=True)
def _one_client(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = TrunkService._cache
    monkeypatch.setattr(TrunkService, "_cache", lambda self, client: cache(self, "client-0"))


def trained(
    codec: str, cache_mb: float, epochs: Sequence[Sequence[Sequence[Batch]]]
) -> tuple[Site, list[int]]:
    """A site after these epochs, a round each, and the bytes of each."""
    site = Site(codec, cache_mb)
    with service_of(site) as service:
        return site, [site.train(service, epoch) for epoch in epochs]


@pytest.mark.parametrize("codec", ["fp32", "bf16"])
def test_what_is_named_is_what_would_have_come(codec: str) -> None:
    """To the bit: nothing is lost where the codec of h2 has no differences."""
    again = [EPOCHS[0]] * 3  # the same batches, for other ones round elsewhere
    plain, plain_bytes = trained(codec, 0, again)
    site, site_bytes = trained(codec, MIB, again)
    for role in ("trunk", "top"):
        assert largest_difference(getattr(plain.parts, role), getattr(site.parts, role)) == 0.0
    h1 = int(EXAMPLES.attention_mask.sum()) * HIDDEN * (4 if codec == "fp32" else 2)
    for before, now in zip(plain_bytes[1:], site_bytes[1:], strict=True):
        assert h1 - 600 < before - now < h1


@pytest.mark.parametrize("codec", ["int4", "klt", "h1=int8 h2=int6"])
def test_both_sides_hold_the_same(codec: str) -> None:
    """Whatever was rounded, and in whatever company an example comes again."""
    site = Site(codec)
    with service_of(site) as service:
        sizes = [site.train(service, epoch) for epoch in (*EPOCHS, *EPOCHS)]
        there = service._caches["client-0"]
    assert len(site.cache.h2) == len(there.h2) == 8
    for name, kept in site.cache.h2.items():
        assert kept.tag == there.h2[name].tag
        assert torch.equal(kept.h2_nD, there.h2[name].h2_nD)
    assert sizes[3] < 0.85 * sizes[0]  # the same batches


def test_h2_is_no_further_off_than_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """A change is written with fewer bits, and what comes of it is about as near."""
    codecs = crossings(read_codecs("int4"), 0)
    cache, other = Cache(2**20), Cache(2**20)
    trunk, client = TrunkCache(cache, crossings(read_codecs("int4"), 0)), ClientCache(other, codecs)
    h1_BTD, h2_BTD = torch.randn(4, 16, 64), torch.randn(4, 16, 64)
    names = [bytes([row]) * 16 for row in range(4)]
    errors, sizes = [], []
    for step in range(4):
        h2_BTD = h2_BTD + 0.2 * torch.randn(4, 16, 64)
        came, answer = cross(trunk, client, h1_BTD, h2_BTD, names, step, codecs)
        errors.append(float((came - h2_BTD).norm() / h2_BTD.norm()))
        sizes.append(answer.activations.size + answer.changes.size)
    assert max(errors[1:]) < 1.3 * errors[0]
    assert max(sizes[1:]) < 0.6 * sizes[0]
    # What has changed too much comes whole.
    came, answer = cross(trunk, client, h1_BTD, torch.randn(4, 16, 64), names, 4, codecs)
    assert not answer.changed
    assert answer.activations.size == sizes[0]


def cross(trunk, client, h1_BTD, h2_BTD, names, step, codecs):  # type: ignore[no-untyped-def]
    """Both ways of one micro-batch, without a network."""
    parcel = Parcel()
    fields = client.write_h1(h1_BTD, None, names, codecs.h1, (step, 0), parcel)
    frame = pb.Compute(step=step, micro=0, **fields)
    trunk.read_h1(frame, None, Payload(b"".join(parcel.parts)))
    parcel = Parcel()
    answer = pb.Activations(**trunk.write_h2(frame, h2_BTD, None, codecs.h2, parcel))
    payload = Payload(b"".join(parcel.parts))
    return client.read_h2(answer, names, list(frame.tags), None, payload), answer


@pytest.mark.parametrize("lost", ["client", "trunk", "both"])
def test_a_lost_cache_costs_bytes_and_nothing_else(lost: str) -> None:
    """Whoever was started anew, everything crosses once more."""
    site = Site("int4")
    with service_of(site) as service:
        first = site.train(service, EPOCHS[0])
        second = site.train(service, EPOCHS[0])
        if lost != "client":
            service._caches.clear()
        if lost != "trunk":
            site.cache = Cache(int(MIB * 2**20))
        after = site.train(service, EPOCHS[0])
        there = service._caches["client-0"]
    assert second < after <= first + 64
    assert {n: k.tag for n, k in site.cache.h2.items()} == {n: k.tag for n, k in there.h2.items()}


def test_a_round_that_was_given_up_leaves_the_client_behind() -> None:
    """The trunk has gone on with what the client never kept: whole rows come, not changes to
    something else."""
    site = Site("int4")
    with service_of(site) as service:
        site.train(service, EPOCHS[0])
        before = copy.copy(site.cache.h2)
        site.train(service, EPOCHS[1])
        site.cache.h2 = before  # what the second round brought was not saved
        site.train(service, EPOCHS[2])
        there = service._caches["client-0"]
    for name, kept in site.cache.h2.items():
        assert torch.equal(kept.h2_nD, there.h2[name].h2_nD)


def test_what_has_no_room_crosses_whole() -> None:
    """Neither side holds more than it may."""
    two = 2.5 * 2 * 12 * HIDDEN * 4 / 2**20
    site = Site("int4", cache_mb=two)
    with service_of(site) as service:
        for epoch in EPOCHS:
            site.train(service, epoch)
        there = service._caches["client-0"]
    held = [t.nbytes for t in there.h1.values()] + [k.h2_nD.nbytes for k in there.h2.values()]
    assert 0 < sum(held) <= two * 2**20
    assert 1 <= len(there.h1) < 8
    assert sum(k.h2_nD.nbytes for k in site.cache.h2.values()) <= two * 2**20


@pytest.mark.parametrize("window", [1, 2, 4])
def test_an_example_twice_in_a_batch_or_a_window(window: int) -> None:
    """The second one finds what the first has left, or comes whole."""
    site, steps = Site("int4"), [[some(0, 0, 1), some(1, 0), some(0), some(2, 2)]]
    with service_of(site) as service:
        for _ in range(3):
            site.train(service, steps, window)
        there = service._caches["client-0"]
    for name, kept in site.cache.h2.items():
        assert torch.equal(kept.h2_nD, there.h2[name].h2_nD)


def test_names_tell_examples_apart_and_nothing_else() -> None:
    """Neither padding nor company counts; a token, a label or another secret does."""
    alone, padded = some(1), random_batch(3, 8, 12, "right")
    secret = b"x" * 32
    row = names_of(secret, padded)[1]
    assert names_of(secret, alone) == [row]
    assert names_of(b"y" * 32, alone) != [row]
    ids, labels = alone.input_ids.clone(), alone.labels.clone()
    ids[0, 0], labels[0, -1] = ids[0, 0] + 1, -100
    for other in (replace(alone, input_ids=ids), replace(alone, labels=labels)):
        assert names_of(secret, other) != [row]


def test_nonsense_is_refused_by_the_trunk() -> None:
    """Before anything is read: what is not one for each row, or was never kept."""
    codecs = crossings(read_codecs("fp32"), 0)
    trunk = TrunkCache(Cache(2**20), crossings(read_codecs("fp32"), 0))
    h1_BTD, names = torch.randn(2, 4, 8), b"a" * 16 + b"b" * 16
    parcel = Parcel()
    tensor = codecs.h1.encode(h1_BTD, None, 0, 0, parcel)
    payload = Payload(b"".join(parcel.parts))
    empty = parcel.put((2, 4, 8), "fp32", b"")
    for fields, words in (
        ({"activations": tensor, "names": names[:-1]}, "31 bytes of names"),
        ({"activations": tensor, "names": names, "tags": [1]}, "1 tags came with 2 rows"),
        ({"activations": tensor, "names": names, "known": b"\x80\x00"}, "2 bytes of bits"),
        ({"activations": empty, "names": names, "known": b"\xc0"}, "is not kept here"),
        ({"activations": tensor, "names": names, "known": b"\xc0"}, "is not kept here"),
    ):
        with pytest.raises(TrunkError, match=words):
            trunk.read_h1(pb.Compute(**fields), None, payload)
    trunk.read_h1(pb.Compute(activations=tensor, names=names), None, payload)
    named = pb.Compute(activations=empty, names=names, known=b"\xc0")
    assert torch.equal(trunk.read_h1(named, None, payload), h1_BTD)
    mask_BT = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    with pytest.raises(TrunkError, match="row 0 of 3 tokens names an example that has 4 tokens"):
        trunk.read_h1(named, mask_BT, payload)
    assert encode_mask(mask_BT)
    with pytest.raises(TrunkError, match="of no row"):
        trunk.read_h1(pb.Compute(activations=tensor, names=names, known=b"\xc0"), None, payload)


def test_rows_of_no_token_take_no_memory() -> None:
    """They take none of the room either: their names would be kept without end."""
    codecs = crossings(read_codecs("int4"), 0)
    cache, mask_BT = Cache(2**20), torch.zeros(8, 4, dtype=torch.bool)
    trunk, mask_BT[0] = TrunkCache(cache, crossings(read_codecs("int4"), 0)), True
    for step in range(3):
        parcel, names = Parcel(), b"".join(bytes([8 * step + row]) * 16 for row in range(8))
        tensor = codecs.h1.encode(torch.randn(8, 4, 64), mask_BT, step, 0, parcel)
        frame = pb.Compute(step=step, activations=tensor, names=names)
        h1_BTD = trunk.read_h1(frame, mask_BT, Payload(b"".join(parcel.parts)))
        trunk.write_h2(frame, h1_BTD, mask_BT, codecs.h2, Parcel())
    assert len(cache.h1) == len(cache.h2) == 3
    assert len(trunk.names()) == 3 * 16


def test_names_do_not_make_a_full_batch_too_large() -> None:
    """However many rows a batch has."""
    rows, codecs = 1000, crossings(read_codecs("fp32"), 0)
    engine = TrunkEngine(
        frozen_parts().trunk, hidden_size=HIDDEN, train=TRAIN, max_sequences=rows, max_tokens=4
    )
    client, parcel = ClientCache(Cache(2**20), codecs), Parcel()
    names = [row.to_bytes(16, "big") for row in range(rows)]
    h1_BTD = torch.randn(rows, 4, HIDDEN)
    fields = client.write_h1(h1_BTD, None, names, codecs.h1, (0, 0), parcel)
    raw = client_frame(parcel, number=1, compute=pb.Compute(**fields))
    assert len(raw) <= engine.largest_frame(codecs.most_bytes)


def test_nonsense_is_refused_by_the_client() -> None:
    """A change to what it does not hold, and bits that are none."""
    codecs = crossings(read_codecs("int4"), 0)
    client, names = ClientCache(Cache(2**20), codecs), [b"a" * 16]
    parcel = Parcel()
    whole = parcel.put((1, 4, 64), "int4", b"")
    change = crossings(read_codecs("int2"), 0).h2.encode(torch.randn(1, 4, 64), None, 0, 0, parcel)
    payload = Payload(b"".join(parcel.parts))
    for fields, words in (
        ({"changes": change, "changed": b"\x80"}, "changes what is not kept here"),
        ({"changed": b"\x80"}, "changes came with shape"),
        ({"kept": b"\x80\x80"}, "2 bytes of bits"),
    ):
        answer = pb.Activations(activations=whole, **fields)
        with pytest.raises(TrunkError, match=words):
            client.read_h2(answer, names, [0], None, payload)
    with pytest.raises(TrunkError, match="17 bytes of names"):
        client.begin(pb.Opened(names=b"a" * 17))


def test_names_without_a_cache_are_refused() -> None:
    """By a trunk that keeps nothing."""
    site = Site("fp32")
    with (
        served(site.engine) as service,
        pytest.raises(TrunkError, match="link.cache_mb=0"),
    ):
        site.train(service, EPOCHS[0])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["tuning.bottom=lora"], "tuning.bottom=frozen"),
        (["tuning.bottom=frozen", "link.transport=messages"], "link.transport=stream"),
    ],
)
def test_what_changes_h1_is_refused(changes: list[str], words: str) -> None:
    """In words, before anything runs."""
    with pytest.raises(ConfigError, match=words):
        load_config("demo", [*changes, "link.cache_mb=16"])


def test_a_bottom_that_is_not_the_same_is_refused() -> None:
    """Dropout, and an embedding that the top trains."""
    for model, words in (
        (tiny_model("gpt2"), "tied embeddings"),
        (tiny_model("llama", attention_dropout=0.1), "dropout"),
    ):
        site = Site("fp32")
        site.parts = split(model, CUT)
        for name, parameter in site.parts.bottom.named_parameters():
            parameter.requires_grad_("dropout" not in words and "wte" in name)
        site.engine = engine_for(site.parts.trunk, TRAIN)
        with service_of(site) as service, pytest.raises(ValueError, match=words):
            site.train(service, EPOCHS[0])
