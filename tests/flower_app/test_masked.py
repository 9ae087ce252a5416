"""Ends that the server never sees: whole runs equal plain averaging, and the server holds noise."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

from conf.rules import ConfigError
from conf.schema import Config
from flower_app.beside import kept_privacy
from flower_app.build import build_client
from flower_app.client import site as site_module
from flower_app.client.masked import reveal
from flower_app.client.site_key import SiteKey, new_site_key, read_site_key
from models import build_scratch, client_state
from simulations.cli.app import app as graft
from strategies.aggregate.joint import JointModel
from strategies.aggregate.masked import take_masked
from tests.flower_app import test_app
from tests.flower_app.grid import InProcessGrid
from tests.flower_app.runs import test_resume

EXACT = "train.lr=0.01 train.eps=1e-3 train.warmup=0"
DEFENDED = "privacy.defence=gaussian privacy.clip=1e6"
"""Nothing is so long."""


@pytest.fixture(autouse=True)
def _flower_task(one_thread: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    monkeypatch.setattr("flower_app.runs.recorder.plot_loss", lambda folder: None)


@pytest.fixture
def key(tmp_path: Path) -> Path:
    new_site_key(tmp_path / "key")
    return tmp_path / "key"


class Recorded(InProcessGrid):
    """Keeps every message that the server gets."""

    def _deliver(self, message: Message) -> Message | None:
        reply = super()._deliver(message)
        if reply is not None:
            self.seen.append(reply)
        return reply


def grid_of(tmp_path: Path, key: Path | None, clients: int = 3, kind: Any = Recorded) -> Any:
    """Clients with a file of unlike size each, so that their weights differ."""
    lines = (tmp_path / "texts.jsonl").read_text(encoding="utf-8").splitlines()
    grid = kind(clients)
    for number in range(clients):
        own = tmp_path / f"{number}.jsonl"
        own.write_text("\n".join(lines[3 * number : 4 * number + 1]), encoding="utf-8")
        grid.node_configs[number] = {"data-path": str(own), "name": f"site-{number}"}
        if key is not None:
            grid.node_configs[number]["site-key"] = str(key)
    return grid


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Tensor]]:
    """The true ends of every client and round, before they are masked."""
    found: list[dict[str, Tensor]] = []
    hide = site_module.hide

    def spy(tensors: dict[str, Tensor], weight: int, key: SiteKey) -> Any:
        found.append({name: tensor.detach().clone() for name, tensor in tensors.items()})
        return hide(tensors, weight, key)

    monkeypatch.setattr(site_module, "hide", spy)
    return found


def numbers_at_the_server(grid: Recorded, folder: Path) -> Iterator[np.ndarray[Any, Any]]:
    """All tensors in the server's messages, its checkpoint files and what lives of its objects."""
    for message in grid.seen:
        if message.has_content():
            for record in message.content.array_records.values():
                yield from (array.numpy() for array in record.values())
    for path in folder.rglob("*.safetensors"):
        yield from (tensor.numpy() for tensor in load_file(path).values())
    for joint in (each for each in gc.get_objects() if type(each) is JointModel):
        yield from (tensor.detach().numpy() for tensor in joint.state_dict().values())
        yield from (tensor.detach().numpy() for tensor in joint.tensors().values())
        yield from (array.numpy() for record in joint._arrays.values() for array in record.values())


def likeness(
    held: list[np.ndarray[Any, Any]], truths: list[dict[str, Tensor]], start: dict[str, Tensor]
) -> float:
    """Largest correlation of what is held, or of a difference of two, with a client's true ends or
    with what they learned: as it is, and scaled by any factor, which correlation forgets."""
    most = 0.0
    by_size: dict[int, list[np.ndarray[Any, Any]]] = {}
    for array in held:
        by_size.setdefault(array.size, []).append(array.reshape(-1))
    for truth in truths:
        for name, tensor in truth.items():
            if tensor.numel() < 1000:
                continue  # chance is not small
            ends = tensor.numpy().reshape(-1).astype(float)
            learned = ends - start[name].numpy().reshape(-1)
            arrays = by_size.get(tensor.numel(), [])
            ints = [array for array in arrays if array.dtype == np.int64]
            apart = [one - other for i, one in enumerate(ints) for other in ints[:i]]
            for array in [*arrays, *apart]:
                values = array.astype(float)
                if values.std() > 0:
                    found = (np.corrcoef(values, truth_of)[0, 1] for truth_of in (ends, learned))
                    most = max(most, *map(abs, found))
    return most


def unmasked(folder: Path, key: Path) -> dict[str, Tensor]:
    """All that a masked run trained, unmasked."""
    masked, _ = take_masked(load_file(folder / "masked.safetensors"))
    assert masked is not None
    return {**load_file(folder / "common.safetensors"), **reveal(masked, read_site_key(key))}


@pytest.mark.parametrize(
    ("changes", "transport", "experiment"),
    [
        ("train.strategy=splitfed-v1", "stream", "demo"),
        pytest.param("train.strategy=merged", "messages", "demo", marks=pytest.mark.slow),
        ("train.strategy=splitfed-v2 train.turns=ordered train.local_steps=2", "messages", "lora"),
        pytest.param("train.strategy=splitfed-v1", "stream", "lora", marks=pytest.mark.slow),
    ],
)
def test_a_masked_run_equals_a_plain_one(
    changes: str, transport: str, experiment: str, tmp_path: Path, key: Path
) -> None:
    """Three rounds, clients of unequal weight: what is learned is the same but for rounding."""
    test_app.tiny_config(tmp_path)
    if experiment == "lora":
        base = build_scratch(test_app.tiny_config(tmp_path).model.scratch, seed=3)
        base.save_pretrained(tmp_path / "base")
        changes += f" model.path={tmp_path / 'base'} model.tokenizer=bytes lora.rank=2"
    rounds = 3 if transport == "stream" else 2
    changes = f"{EXACT} train.rounds={rounds} link.transport={transport} {changes}"
    runs = {}
    for ends, file in (("plain", None), ("masked", key)):
        config = test_app.tiny_config(
            tmp_path, f"{changes} privacy.ends={ends} {DEFENDED}", experiment
        )
        runs[ends] = test_app.run(config, grid_of(tmp_path, file))

    plain, masked = (
        [r["evaluate"]["loss"] for r in metrics if r["kind"] == "round"]
        for _, metrics, _ in runs.values()
    )
    assert masked == pytest.approx(plain, abs=2e-6)
    assert plain[-1] < plain[0] - 1e-3
    assert not (runs["masked"][0] / "model").exists()

    target = tmp_path / "site" / "model"
    result = CliRunner().invoke(
        graft, ["unmask", str(runs["masked"][0]), "--site-key", str(key), "--to", str(target)]
    )
    assert result.exit_code == 0, result.output
    assert kept_privacy(target).clip == 1e6
    expected, found = (
        load_file(next(folder.glob("*model.safetensors")))
        for folder in (runs["plain"][0] / "model", target)
    )
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.allclose(found[name], tensor, atol=2e-6), name


@pytest.mark.parametrize("broken", ["", "no masks", "one mask for all"])
def test_nothing_that_the_server_holds_tells_of_the_ends(
    broken: str,
    tmp_path: Path,
    key: Path,
    trained: list[dict[str, Tensor]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its messages, files and objects, alone and less one another; broken masks are found."""
    gc.collect()
    config = test_app.tiny_config(
        tmp_path, f"{EXACT} train.rounds=2 privacy.ends=masked output.checkpoint_every=1"
    )
    mask = SiteKey.mask
    if broken == "no masks":
        monkeypatch.setattr(SiteKey, "mask", lambda self, nonce, name, n: np.zeros(n, "<i8"))
    elif broken:
        monkeypatch.setattr(SiteKey, "mask", lambda self, nonce, name, n: mask(self, b"", name, n))
    grid = grid_of(tmp_path, key)

    folder, _, _ = test_app.run(config, grid)

    assert len(trained) == 6
    start = first_ends(config)
    held = list(numbers_at_the_server(grid, folder))
    assert any(array.dtype == np.int64 and array.size > 1000 for array in held)
    found = likeness(held, trained, start)
    assert found > 0.9 if broken else found < 0.25, found


def first_ends(config: Config) -> dict[str, Tensor]:
    """What all clients begin with."""
    return {name: t.detach().clone() for name, t in client_state(*build_client(config)).items()}


class Lossy(Recorded):
    """An answer of site-1 in round 1 is lost, after its work."""

    def _deliver(self, message: Message) -> Message | None:
        reply = super()._deliver(message)
        place = self._number(message), message.content.config_records["ticket"]["round"]
        return None if message.metadata.message_type == "train" and place == (1, 1) else reply


def test_a_client_that_is_dropped_in_mid_round_harms_nothing(tmp_path: Path, key: Path) -> None:
    changes = f"{EXACT} train.rounds=2 federation.round_timeout=1 federation.min_clients=1"
    curves = []
    for ends, file in (("plain", None), ("masked", key)):
        config = test_app.tiny_config(tmp_path, f"{changes} privacy.ends={ends}")
        _, metrics, _ = test_app.run(config, grid_of(tmp_path, file, kind=Lossy))
        rounds = [each for each in metrics if each["kind"] == "round"]
        assert rounds[1]["missing"].keys() == {"site-1"}
        assert "site-1" in rounds[2]["clients"]
        curves.append([each["evaluate"]["loss"] for each in rounds])
    assert curves[1] == pytest.approx(curves[0], abs=2e-6)


@pytest.mark.parametrize("transport", ["stream", pytest.param("messages", marks=pytest.mark.slow)])
def test_a_killed_masked_run_goes_on(
    transport: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit: nonces differ, and what they mask does not. The key is the default one here."""
    monkeypatch.setenv("GRAFT_HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    key = tmp_path / "home" / "site.key"
    new_site_key(key)
    config = test_resume.configured(tmp_path, f"privacy.ends=masked link.transport={transport}")
    smooth = test_resume.run(config, InProcessGrid(2))

    broken = test_resume.run(config, test_resume.killing(InProcessGrid(2), 3))
    with pytest.raises(ConfigError, match=r"privacy.ends was 'masked' and cannot become 'plain'"):
        test_resume.resume(broken, InProcessGrid(2), "privacy.ends=plain")
    test_resume.resume(broken, InProcessGrid(2, first_id=5000))

    assert test_resume.curve(broken) == test_resume.curve(smooth)
    one, other = (unmasked(folder, key) for folder in (broken, smooth))
    assert all(torch.equal(one[name], tensor) for name, tensor in other.items())


def test_sums_of_another_key_are_not_gone_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRAFT_HOME", str(tmp_path))
    new_site_key(tmp_path / "site.key")
    config = test_resume.configured(tmp_path, "privacy.ends=masked federation.round_timeout=2")
    broken = test_resume.run(config, test_resume.killing(InProcessGrid(2), 3))
    (tmp_path / "site.key").unlink()
    new_site_key(tmp_path / "site.key")

    with pytest.raises(RuntimeError, match="another site key .* than the ends of the run before"):
        test_resume.resume(broken, InProcessGrid(2))


def test_a_client_with_another_key_or_none_is_named(tmp_path: Path, key: Path) -> None:
    config = test_app.tiny_config(tmp_path, "privacy.ends=masked federation.min_clients=3")
    grid = grid_of(tmp_path, key)
    new_site_key(tmp_path / "other")
    grid.node_configs[1]["site-key"] = str(tmp_path / "other")
    grid.node_configs[2]["site-key"] = str(tmp_path / "nowhere")

    with pytest.raises(RuntimeError, match="1 of 3 connected") as error:
        test_app.run(config, grid)

    assert "site-1 has another site key (check " in str(error.value)
    assert "nowhere cannot be read" in str(error.value)


class Copying(Recorded):
    """Site-2 shows the nonce that site-1 has drawn."""

    def _deliver(self, message: Message) -> Message | None:
        reply = super()._deliver(message)
        assert reply is not None
        if message.metadata.message_type == "train" and reply.has_content():
            mask = reply.content.config_records["mask"]
            if self._number(message) == 1:
                self.nonce = mask["nonce"]
            elif self._number(message) == 2:
                mask["nonce"] = self.nonce
        return reply


def test_two_clients_with_one_nonce_do_not_end_the_run(tmp_path: Path, key: Path) -> None:
    """It costs who answers later the round."""
    config = test_app.tiny_config(tmp_path, "privacy.ends=masked train.rounds=1")
    grid = grid_of(tmp_path, key, kind=Copying)
    grid.present = {1, 2}

    _, metrics, _ = test_app.run(config, grid)

    told = next(each for each in metrics if each["kind"] == "round" and each["round"])
    assert list(told["clients"]) == ["site-1"]
    assert "nonce of another client's" in told["missing"]["site-2"]


def test_a_site_with_a_key_takes_no_part_where_the_server_could_read(
    tmp_path: Path, key: Path
) -> None:
    """The configuration comes from the server: a site does not take its word for what it shows."""
    config = test_app.tiny_config(tmp_path)

    with pytest.raises(RuntimeError, match=r"this run has privacy.ends=plain"):
        test_app.run(config, grid_of(tmp_path, key))


def test_a_server_that_asks_for_ends_does_not_get_them(tmp_path: Path, key: Path) -> None:
    config = test_app.tiny_config(tmp_path, "privacy.ends=masked train.rounds=1")
    grid = grid_of(tmp_path, key)
    test_app.run(config, grid)
    asked = [m for m in grid.seen if "ticket" in m.content.config_records]
    evaluate = next(m for m in reversed(asked) if m.metadata.message_type == "evaluate")
    curious = dict(evaluate.content.config_records["ticket"]) | {"send-tensors": True}
    content = RecordDict({**evaluate.content, "ticket": ConfigRecord(curious)})

    reply = grid._deliver(Message(content, 100, message_type="query"))

    assert "may not read them" in str(reply.content.config_records["outcome"]["error"])
    assert not any(reply.content.array_records.values())


def test_other_cuts_and_ranks_are_refused_in_words(tmp_path: Path, key: Path) -> None:
    config = test_app.tiny_config(tmp_path, "privacy.ends=masked federation.min_clients=3")
    grid = grid_of(tmp_path, key)
    grid.node_configs[2]["cut-bottom"] = 2

    with pytest.raises(RuntimeError, match="take cut-bottom out, or use privacy.ends=plain"):
        test_app.run(config, grid)
