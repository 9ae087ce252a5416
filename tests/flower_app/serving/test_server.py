"""A trunk that is served, and a client's model with it: the same text, whatever happens."""

from __future__ import annotations

import os
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2
from torch import Tensor
from transformers import ByT5Tokenizer, PreTrainedModel

from conf.schema import LinkConfig
from conf.sections.link import read_codecs
from flower_app.serving.access import Access, read_access
from flower_app.serving.client import Joined, connect
from flower_app.serving.server import Server, Serving, running, serve, sources_of
from models import Cut
from strategies.errors import TrunkError
from strategies.transport.tickets import new_key
from tests.models.helpers import ids, saved

pytestmark = pytest.mark.usefixtures("one_thread")

SHORT = LinkConfig(timeout=20.0, grace=5.0)
NEW = 24


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreTrainedModel]:
    """A model and the folder that it is saved in."""
    path = tmp_path_factory.mktemp("model")
    model = saved(path)
    ByT5Tokenizer().save_pretrained(path)
    return path, model


@pytest.fixture(scope="module")
def folder(made: tuple[Path, PreTrainedModel]) -> Path:
    return made[0]


@pytest.fixture(scope="module")
def whole(made: tuple[Path, PreTrainedModel]) -> PreTrainedModel:
    """The model unsplit."""
    return made[1]


def serving(folder: Path, access: Path, **changes: object) -> Serving:
    right = Serving(
        sources=(("tiny", str(folder)),), access=access, cut=Cut(1, 1), link=replace(SHORT)
    )
    return replace(right, **changes)  # type: ignore[arg-type]


@contextmanager
def started(wanted: Serving) -> Iterator[Server]:
    server = Server(wanted)
    server.start()
    try:
        yield server
    finally:
        server.stop()


@contextmanager
def joined(access: Path, folder: Path, **how: object) -> Iterator[Joined]:
    with connect(access / "client-1.json", folder, **{"link": SHORT, **how}) as found:  # type: ignore[arg-type]
        yield found


def greedy(model: PreTrainedModel, **how: object) -> Tensor:
    with torch.no_grad():
        return model.generate(ids(batch=1), max_new_tokens=NEW, do_sample=False, **how)  # type: ignore[operator, no-any-return]


def test_the_text_of_a_served_trunk_is_the_unsplit_models(
    folder: Path, whole: PreTrainedModel, tmp_path: Path
) -> None:
    with started(serving(folder, tmp_path)), joined(tmp_path, folder) as client:
        assert torch.equal(greedy(client.model), greedy(whole))
        assert torch.equal(greedy(client.model, num_beams=2), greedy(whole, num_beams=2))
        assert client.name == "tiny"
        assert client.tokenizer("a").input_ids


def test_a_server_that_was_started_again_goes_on_with_the_same_files(
    folder: Path, whole: PreTrainedModel, tmp_path: Path
) -> None:
    """It stops in the middle of a text, and its sessions with it."""
    first = Server(serving(folder, tmp_path))
    first.start()
    address = first.service.address
    servers = [first]

    class Restart:
        calls = 0

        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            self.calls += 1
            if self.calls == NEW // 2:
                first.service._server.stop(None).wait()
                again = serving(folder, tmp_path, link=replace(SHORT, bind=address))
                servers.append(Server(again))
                servers[1].start()
            return scores

    with joined(tmp_path, folder) as client:
        assert torch.equal(greedy(client.model, logits_processor=[Restart()]), greedy(whole))
    assert len(servers) == 2
    for server in servers:
        server.stop()


def test_models_are_chosen_by_name(folder: Path, whole: PreTrainedModel, tmp_path: Path) -> None:
    other = saved(tmp_path / "other", "qwen2")
    ByT5Tokenizer().save_pretrained(tmp_path / "other")
    both = sources_of([str(folder)], [f"b={tmp_path / 'other'}"])
    with started(serving(folder, tmp_path, sources=both)):
        with (
            joined(tmp_path, folder) as first,
            joined(tmp_path, tmp_path / "other", model="b") as b,
        ):
            assert torch.equal(greedy(first.model), greedy(whole))
            assert torch.equal(greedy(b.model), greedy(other))
        with pytest.raises(ValueError, match=r"no model 'c' is served there; there is .*, b"):
            connect(tmp_path / "client-1.json", folder, model="c")
        with pytest.raises(ValueError, match="another model than 'b'.*their weights differ"):
            connect(tmp_path / "client-1.json", folder, model="b")
        # Nor does a file that was changed help.
        access = read_access(tmp_path / "client-1.json")
        liar = replace(access.models[1], fingerprint=access.models[0].fingerprint)
        replace(access, models=(liar,)).write(tmp_path / "client-1.json")
        with pytest.raises(TrunkError, match="ends are of another model than the trunk of 'b'"):
            connect(tmp_path / "client-1.json", folder, link=SHORT)


def test_access_is_written_for_its_client_alone_and_kept(folder: Path, tmp_path: Path) -> None:
    def files() -> dict[str, Access]:
        return {p.stem: read_access(p) for p in sorted(tmp_path.glob("client-*.json"))}

    with started(serving(folder, tmp_path, clients=2)) as server:
        before = files()
        words = "\n".join(server.words())
    assert all((p.stat().st_mode & 0o777) == 0o600 for p in tmp_path.glob("*.json"))
    assert "client-2.json" in words
    assert "llama of 4 blocks" in words
    handed_out = tmp_path / "client-2.json"
    handed_out.rename(tmp_path / "elsewhere.json")

    with started(serving(folder, tmp_path, clients=3)) as server:
        after = files()
        assert "client-2: its file was handed out" in "\n".join(server.words())
        moved = replace(before["client-2"], address=server.service.address)
        moved.write(tmp_path / "elsewhere.json")
        with connect(tmp_path / "elsewhere.json", folder, link=SHORT):
            pass

    assert list(after) == ["client-1", "client-3"]
    assert after["client-1"].key == before["client-1"].key
    assert len({each.key for each in (*before.values(), after["client-3"])}) == 3


def test_a_wrong_access_file_is_refused_in_words(folder: Path, tmp_path: Path) -> None:
    with started(serving(folder, tmp_path)) as server:
        path = tmp_path / "client-1.json"
        right = read_access(path)
        for wrong in (replace(right, key=new_key()), replace(right, client="client-9")):
            wrong.write(path)
            with pytest.raises(TrunkError, match="this access file opens nothing here"):
                connect(path, folder, link=SHORT)
        replace(right, expires=time.time() - 1).write(path)
        with pytest.raises(ValueError, match=r"expired on .* UTC: ask whoever runs the server"):
            connect(path, folder)
        # The server has its own word on it.
        right.write(path)
        mine = server.service._invited
        mine["client-1"] = replace(mine["client-1"], expires=time.time() - 1)
        with pytest.raises(TrunkError, match="access of 'client-1' has expired"):
            connect(path, folder, link=SHORT)
        assert server.service.sessions() == 0
    for text in ("", "{}", '{"graft_access": 9}', '{"graft_access": 1, "key": "zz"}', "[1]"):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"client-1\.json"):
            connect(path, folder)
    with pytest.raises(ValueError, match="No such file"):
        connect(tmp_path / "none.json", folder)


def test_an_expired_client_gets_a_new_file(folder: Path, tmp_path: Path) -> None:
    with started(serving(folder, tmp_path, days=1e-9)):
        pass
    with pytest.raises(ValueError, match="expired"):
        read_access(tmp_path / "client-1.json")
    with started(serving(folder, tmp_path, days=1.0)):
        assert read_access(tmp_path / "client-1.json").expires == pytest.approx(
            time.time() + 86_400, abs=60
        )
        with joined(tmp_path, folder):
            pass


def test_away_from_loopback_there_is_tls_which_stays(
    folder: Path, whole: PreTrainedModel, tmp_path: Path
) -> None:
    link = replace(SHORT, tls="on", codec=read_codecs("bf16"))
    with started(serving(folder, tmp_path, link=link)):
        with joined(tmp_path, folder) as client:
            assert greedy(client.model).shape == (1, 9 + NEW)
        first = read_access(tmp_path / "client-1.json")
    with started(serving(folder, tmp_path, link=link)):
        assert read_access(tmp_path / "client-1.json").certificate == first.certificate != ""
    assert (os.stat(tmp_path / "certificate-key.pem").st_mode & 0o777) == 0o600


def test_health_is_told_without_a_token(folder: Path, tmp_path: Path) -> None:
    with (
        started(serving(folder, tmp_path)) as server,
        grpc.insecure_channel(server.service.address) as channel,
    ):
        check = channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        kinds = health_pb2.HealthCheckResponse
        assert check(health_pb2.HealthCheckRequest()).status == kinds.SERVING
        server._health.serving = False
        assert check(health_pb2.HealthCheckRequest(service="graft.Trunk")).status == (
            kinds.NOT_SERVING
        )
        with pytest.raises(grpc.RpcError, match="NOT_FOUND"):
            check(health_pb2.HealthCheckRequest(service="other"))


def test_prometheus_is_told_what_sessions_hold(folder: Path, tmp_path: Path) -> None:
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        port = int(trial.getsockname()[1])
    lines: list[str] = []
    wanted = serving(folder, tmp_path, metrics=("127.0.0.1", port))
    with running(wanted, lines.append) as server, joined(tmp_path, folder) as client:
        session = client.trunk.open()
        session.forward(torch.zeros(1, 5, 32))
        session.forward(torch.zeros(1, 1, 32), length=5)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            told = dict(
                line.rsplit(" ", 1)
                for line in answer.read().decode().splitlines()
                if not line.startswith("#")
            )
        held = server.memory.bytes
        server.stop()
    found = {name: float(value) for name, value in told.items()}
    assert lines == [f"metrics  http://127.0.0.1:{port}/metrics"]
    assert found["graft_trunk_sessions"] == 1
    assert found["graft_trunk_tokens_total"] == 6
    assert found["graft_trunk_kv_bytes"] == held > 0
    assert found["graft_trunk_kv_limit_bytes"] == 2**30
    assert found["graft_trunk_queue"] == 0
    assert found['graft_trunk_frame_seconds_count{frame="generate"}'] == 2
    assert found["process_resident_memory_bytes"] > 0
    assert found["process_cpu_seconds_total"] > 0


@pytest.mark.parametrize("patient", [True, False])
def test_the_end_is_asked_for_once_and_sessions_may_end_first(
    folder: Path, whole: PreTrainedModel, tmp_path: Path, patient: bool
) -> None:
    """And asked for twice it comes at once."""
    asked: list[int] = [0]
    lines: list[str] = []
    thread = threading.Thread(
        target=serve,
        args=(serving(folder, tmp_path),),
        kwargs={"grace": 60.0, "asked": lambda: asked[0], "say": lines.append},
    )
    thread.start()
    _until(lambda: "ready" in str(lines))
    with joined(tmp_path, folder, link=replace(SHORT, grace=0.5)) as client:
        h = torch.randn(1, 3, whole.config.hidden_size)
        session = client.trunk.open()
        session.forward(h)
        asked[0] = 1
        _until(lambda: "stopping: 1 sessions" in str(lines))
        session.forward(h, length=3)  # it may go on
        with pytest.raises(TrunkError, match=r"about to stop and opens no session"):
            client.trunk.open().forward(h)
        if patient:
            session.close()
        else:
            asked[0] = 2
        thread.join(10)
        assert not thread.is_alive()
        if not patient:
            with pytest.raises(TrunkError, match=r"did not bring it back"):
                session.forward(h, length=6)
    assert lines[-1] == "stopped"


def _until(true: object, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_what_to_serve_is_asked_for_in_words(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing is to be served"):
        Server(serving(folder, tmp_path, sources=()))
    twice = sources_of([str(folder), str(folder)], [])
    with pytest.raises(ValueError, match="two models would be called"):
        Server(serving(folder, tmp_path, sources=twice))
    with pytest.raises(ValueError, match="NAME=SOURCE"):
        sources_of([], ["x"])
