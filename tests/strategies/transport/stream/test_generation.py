"""Generation over the stream: equal to an engine nearby, whatever happens on the way."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import replace

import grpc
import pytest
import torch
from google.protobuf.message import Message

from strategies.errors import TrunkError
from strategies.transport import tickets
from strategies.transport import trunk_pb2 as pb
from strategies.transport.codec.registry import find_codec
from strategies.transport.frames import client_frame, read_client_frame, read_server_frame
from strategies.transport.payload import Parcel
from strategies.transport.stream.generation import Invited, Policy
from strategies.transport.stream.options import (
    CONNECTION_KEY,
    FINGERPRINT_KEY,
    METHOD,
    SESSION_KEY,
    STEPS_KEY,
    TOKEN_KEY,
)
from strategies.transport.tickets import new_key, new_nonce, public_half
from tests.strategies.helpers import compute_frame
from tests.strategies.transport.stream.generation_helpers import (
    CLIENT_KEY,
    NONCE,
    TRUNK_KEY,
    D,
    Near,
    SumEngine,
    Watch,
    link,
    numbers,
    opened,
    place,
    serving,
)

MIB = 2**20
NAME = "one/" + "0" * 32


def until(true: Callable[[], object], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_session_far_away_does_what_one_nearby_does() -> None:
    """Prefill with padding, single tokens, rows chosen, set back, nothing kept."""
    engine, near = SumEngine(), Near()
    mask = torch.tensor([[False, True, True], [True, True, True]])
    calls = (
        (numbers(0), {"mask_BT": mask}),
        (numbers(1, 2, 1), {"length": 3}),
        (numbers(2, 3, 1), {"length": 4, "rows": (1, 0, 1)}),
        (numbers(3, 3, 2), {"length": 2, "positions_BT": torch.tensor([[7, 9]] * 3)}),
        (numbers(4, 3, 2), {"length": 4, "keep": False}),
        (numbers(7, 3, 9), {"length": 4}),
        (numbers(5, 3, 1), {"length": 4}),
        (numbers(6, 1, 1), {"length": 0}),
    )
    with serving(engine) as service:
        far, losing = opened(service), opened(service)
        for h, how in calls:
            want = near.forward(h, **how)
            assert torch.equal(far.forward(h, **how).h_BTD, want), how
            losing._forget()  # every call is preceded by all that came before
            assert torch.equal(losing.forward(h, **how).h_BTD, want), how
        far.close()
        losing.close()
        until(lambda: not service.sessions())
    assert engine.memory.bytes == 0


@pytest.mark.parametrize(("codec", "off"), [("bf16", 0.01), ("int8", 0.02), ("int4", 0.2)])
def test_tokens_travel_by_any_codec(codec: str, off: float) -> None:
    """One position at a time, too; and what is sent again after a loss is near it again."""
    near = Near()
    with serving(SumEngine(), codec=codec) as service:
        far = opened(service)
        for step, h in enumerate((numbers(0) / 7, numbers(1, 2, 1) / 7, numbers(2, 2, 1) / 7)):
            length = 0 if not step else 2 + step
            want = near.forward(h, length=length)
            for _ in range(2):
                got = far.forward(h, length=length).h_BTD.float()
                assert (got - want).norm() < off * want.norm()
                far._forget()
        assert not torch.equal(got, want)
        far.close()


def test_frames_hold_numbers_masks_and_activations_and_no_ids() -> None:
    watch = Watch()
    with serving(SumEngine()) as service:
        session = opened(service, interceptors=[watch])
        session.forward(numbers(0), mask_BT=torch.tensor([[False, True, True], [True] * 3]))
        session.forward(numbers(1, 2, 1), rows=(1, 0), length=3)
        session.close()
    fields = set()
    for raw in watch.sent:
        frame = read_client_frame(raw)
        body = getattr(frame.head, frame.kind)
        for field, value in body.ListFields():
            tensor = isinstance(value, Message)
            fields.add((field.name, tuple(value.shape) if tensor else None))
    assert fields == {
        ("number", None), ("length", None), ("rows", None), ("early", None), ("mask", None),
        ("activations", (2, 3, D)), ("activations", (2, 1, D)),
    }  # fmt: skip


def test_a_frame_that_comes_again_is_answered_alike_and_done_once() -> None:
    engine, watch, near = SumEngine(), Watch(), Near()
    watch.lose_answers = 2
    with serving(engine) as service:
        far = opened(service, interceptors=[watch], link=link(timeout=2.0, grace=1.0))
        for step in range(3):
            h = numbers(step, 1, 1)
            want = near.forward(h, length=step)
            assert torch.equal(far.forward(h, length=step).h_BTD, want)
        frames = [read_client_frame(raw).head.generate.number for raw in watch.sent]
    assert engine.forwards == 3
    assert frames == [1, 1, 1, 2, 3]


def test_a_broken_stream_is_opened_again_and_the_session_goes_on() -> None:
    engine, near = SumEngine(), Near()
    with serving(engine) as service:
        far = opened(service)
        far.forward(numbers(0))
        near.forward(numbers(0))
        assert far._way is not None
        assert far._way._connection.stream is not None
        far._way._connection.stream._channel.close()
        got = far.forward(numbers(1, 2, 1), length=3).h_BTD
        assert torch.equal(got, near.forward(numbers(1, 2, 1), length=3))
        assert far._way.connections == 2
    assert engine.forwards == 2


def test_who_rests_makes_room_and_comes_back_unnoticed() -> None:
    """Of three sessions two find room; nobody under way is ended."""
    each = 2 * 3 * D * 4
    engine = SumEngine(total_mb=2.5 * each / MIB, idle=0.0)
    with serving(engine) as service:
        far, near = [opened(service) for _ in range(3)], [Near() for _ in range(3)]
        for turn in range(2):
            for i in range(3):
                h = numbers(i + turn)
                assert torch.equal(far[i].forward(h).h_BTD, near[i].forward(h))
                got = far[i].forward(numbers(i, 2, 1), length=2).h_BTD
                assert torch.equal(got, near[i].forward(numbers(i, 2, 1), length=2))
        got = far[0].forward(numbers(9, 2, 1), length=3).h_BTD  # it was ended for the third's sake
        assert torch.equal(got, near[0].forward(numbers(9, 2, 1), length=3))
        assert engine.memory.bytes <= engine.memory.limits.total_mb * MIB


def test_full_memory_is_said_and_a_shorter_text_still_goes() -> None:
    with serving(SumEngine(session_mb=100 / MIB)) as service:
        session = opened(service)
        with pytest.raises(TrunkError, match="larger --session-kv-mb"):
            session.forward(numbers(0, 2, 4))
        assert session.forward(numbers(0, 1, 2)).h_BTD.shape == (1, 2, D)
    with serving(SumEngine(total_mb=100 / MIB, idle=9.0)) as service:
        held, late = opened(service), opened(service)
        held.forward(numbers(0, 1, 4))
        with pytest.raises(TrunkError, match="try again later"):
            late.forward(numbers(0, 1, 4))
        held.forward(numbers(1, 1, 1), length=4)


def test_a_fork_begins_with_what_the_other_has_then() -> None:
    """On the trunk, if nobody has set the other back meanwhile; else from the history."""
    for set_back, forks in ((False, 1), (True, 0)):
        engine, near = SumEngine(), Near()
        with serving(engine) as service:
            first = opened(service)
            first.forward(numbers(0))
            fork = first.fork().fork()  # of one that has sent nothing yet
            first.forward(numbers(1), length=1 if set_back else 3)
            near.forward(numbers(0))
            want = near.forward(numbers(2, 2, 1), length=3)
            assert torch.equal(fork.forward(numbers(2, 2, 1), length=3).h_BTD, want)
        assert engine.forks == forks


def test_seats_are_few_and_who_rests_leaves_its_own() -> None:
    policy = Policy(sessions=1, rest=0.3)
    with serving(SumEngine(), policy=policy) as service:
        first, second, near = opened(service), opened(service), Near()
        first.forward(numbers(0))
        near.forward(numbers(0))
        with pytest.raises(TrunkError, match="1 sessions are open.*--max-sessions"):
            second.forward(numbers(1))
        time.sleep(0.4)
        second.forward(numbers(1))
        time.sleep(0.4)
        got = first.forward(numbers(2), length=3).h_BTD
        assert torch.equal(got, near.forward(numbers(2), length=3))
        assert service.sessions() == 1


def test_a_session_without_a_frame_ends_and_its_client_does_not_notice() -> None:
    engine, near = SumEngine(), Near()
    with serving(engine, policy=Policy(idle=0.4)) as service:
        far = opened(service)
        far.forward(numbers(0))
        near.forward(numbers(0))
        until(lambda: not service.sessions())
        assert engine.memory.bytes == 0
        got = far.forward(numbers(1), length=3).h_BTD
        assert torch.equal(got, near.forward(numbers(1), length=3))


def test_who_is_interrupted_begins_anew() -> None:
    engine, near = SumEngine(), Near()
    with serving(engine) as service:
        far = opened(service)
        far.forward(numbers(0))
        near.forward(numbers(0))
        assert far._way is not None
        far._way._wait_for = _interrupted  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            far.forward(numbers(1), length=3)
        got = far.forward(numbers(2), length=3).h_BTD
        assert torch.equal(got, near.forward(numbers(2), length=3))


def _interrupted(request: object) -> None:
    raise KeyboardInterrupt


def test_a_session_is_left_with_whoever_used_it() -> None:
    with serving(SumEngine()) as service:
        session = opened(service)
        session.forward(numbers(0))
        session.close()
        until(lambda: not service.sessions())
        assert not service._seats
        del session
        gc.collect()


def raw_call(
    service: object, frames: list[bytes], *, name: str = NAME, **changes: str | bytes
) -> list[pb.ServerFrame]:
    """What comes to these frames over a stream with metadata of one's own."""
    key = changes.pop("key", CLIENT_KEY)
    assert isinstance(key, bytes)
    secret = tickets.session_secret(key, public_half(TRUNK_KEY), NONCE, name)
    number = str(changes.pop("number", "1"))
    metadata = {
        SESSION_KEY: name,
        CONNECTION_KEY: number,
        TOKEN_KEY: tickets.token(secret, int(number)),
        STEPS_KEY: "0",
        FINGERPRINT_KEY: "of-a",
        **changes,
    }
    with grpc.insecure_channel(service.address) as channel:  # type: ignore[attr-defined]
        call = channel.stream_stream(METHOD)(iter(frames), metadata=tuple(metadata.items()))
        return [read_server_frame(raw).head for raw in call]


def generate(h_BTD: torch.Tensor | None = None, codec: str = "fp32", **fields: object) -> bytes:
    parcel = Parcel()
    h1 = find_codec(codec)().encode(numbers(0) if h_BTD is None else h_BTD, None, 0, 0, parcel)
    fields = {"number": 1, "activations": h1, **fields}
    return client_frame(parcel, generate=pb.Generate(**fields))  # type: ignore[arg-type]


def test_only_a_clients_own_key_opens_its_sessions_and_each_name_once() -> None:
    other = Invited(public_key=public_half(new_key()), nonce=new_nonce())
    invited = {"one": Invited(public_key=public_half(CLIENT_KEY), nonce=NONCE), "two": other}
    with serving(SumEngine(), invited=invited) as service:
        mine = opened(service)
        mine.forward(numbers(0))
        assert mine._way is not None
        strangers: list[dict[str, str | bytes]] = [
            {"key": new_key()},
            {"name": "two/" + "0" * 32},
            {"name": "none/" + "0" * 32},
            {"name": "one"},
            {"name": "one/x"},
            {"name": ""},
            {"name": mine._way.session, "number": "1"},  # a token that was used
            {"number": "0"},
        ]
        for wrong in strangers:
            with pytest.raises(grpc.RpcError) as refused:
                raw_call(service, [generate()], **wrong)  # type: ignore[arg-type]
            assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED, wrong
        assert service.sessions() == 1
        mine.forward(numbers(1), length=3)

        assert raw_call(service, [generate()])[1].WhichOneof("body") == "generated"
        until(lambda: service.sessions() == 2)  # its stream broke: it may come back
        again = raw_call(service, [generate(number=2, length=3)], number="2")
        assert again[1].WhichOneof("body") == "generated"
        closing = [client_frame(close=pb.Close())]
        assert raw_call(service, closing, number="3")[1].WhichOneof("body") == "closed"
        until(lambda: service.sessions() == 1)
        for number in ("1", "2", "4"):
            (late,) = raw_call(service, [generate()], number=number)
            assert late.failure.kind == "gone"


def test_no_client_begins_with_anothers_session() -> None:
    theirs = "two/" + "1" * 32
    with serving(SumEngine(), SumEngine()) as service:
        offers = list(service._offers.values())
        offers[0].engine.open(theirs)
        reply = raw_call(service, [generate(fork=theirs)])[-1]
        assert "another client's" in reply.failure.message
        session = opened(service, model="b", fingerprint="of-b")
        session.forward(numbers(0))
        assert session._way is not None
        reply = raw_call(service, [generate(fork=session._way.session)], name=NAME[:-1] + "1")[-1]
        assert reply.failure.kind == "gone"  # of another model


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"model": "z"}, "no model 'z' is served here; there is a"),
        ({"fingerprint": "of-b"}, "ends are of another model than the trunk of 'a'"),
    ],
)
def test_a_wrong_model_is_refused_in_words(model: dict[str, str], words: str) -> None:
    with serving(SumEngine()) as service, pytest.raises(TrunkError, match=words):
        opened(service, **model).forward(numbers(0))


@pytest.mark.parametrize(
    ("frame", "words"),
    [
        (b"\xff" * 9, "did not arrive as it was sent"),
        (compute_frame(numbers(0)), "this trunk generates: 'compute'"),
        (client_frame(apply=pb.Apply()), "this trunk generates: 'apply'"),
        (generate(number=0), "came again"),
        (generate(number=9), "not the beginning"),
        (generate(length=1), "not there"),
        (generate(torch.ones(2, 3, 9)), "bad shape"),
        (generate(torch.ones(2, 3, D), "fp16"), "was agreed"),
        (generate(activations=pb.Tensor()), "0 dimensions"),
        (generate(mask=b"\xff\xff"), r"mask: shape \(2, 3\) takes 1 bytes, 2 came"),
        (generate(mask=b"\0"), "all positions are padding"),
        (generate(positions=[1, 2]), "2 positions came"),
    ],
)
def test_hostile_frames_are_answered_in_words(frame: bytes, words: str) -> None:
    with serving(SumEngine()) as service:
        reply = raw_call(service, [frame])[-1]
        assert reply.WhichOneof("body") == "failure"
        with pytest.raises(TrunkError, match=words):
            raise TrunkError(reply.failure.message)
        if reply.failure.kind != "damaged":
            until(lambda: not service.sessions())


def test_a_server_that_is_not_there_is_waited_for_and_then_said() -> None:
    with serving(SumEngine()) as service:
        away = replace(place(service), link=link(timeout=4.0, grace=0.5))
    session = opened(service, link=away.link)
    started = time.monotonic()
    with pytest.raises(TrunkError, match="no trunk answers at .*graft serve"):
        session.forward(numbers(0))
    assert 0.4 < time.monotonic() - started < 3
