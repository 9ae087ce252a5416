"""A checkpoint is whole or not there, damage is noticed, and a full disk costs no run."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from conf import VERSION
from conf.load import to_dict
from conf.schema import Config, LinkConfig, OutputConfig
from flower_app.runs import checkpoint, recorder
from flower_app.runs.checkpoint import Damaged, Facts, folders, read, write
from flower_app.runs.flatten import flatten, unflatten
from flower_app.runs.folders import RunLock
from flower_app.runs.journal import Journal, cut_back
from flower_app.runs.keeper import Keeper
from flower_app.runs.recorder import Recorder
from flower_app.runs.resume import look_up, take_up
from strategies.rounds.losses import Losses

FULL = OSError(errno.ENOSPC, "No space left on device")


class Killed(BaseException):
    """Nothing of the process goes on."""


def facts(number: int = 1, **changes: Any) -> Facts:
    config = Config(
        model=replace(Config().model, path="/m"), train=replace(Config().train, rounds=9)
    )
    values = {"loss": 3.0, "clients": ["a", "b"], "started": "then", "seconds": 1.5, **changes}
    return Facts(round=number, config=to_dict(config), **values)


def state(number: int = 1) -> dict[str, Any]:
    return {"trunk": {"w": torch.full((3,), float(number))}, "step": number}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with the checkpoints of rounds 1 to 3."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").touch()
    for number in (1, 2, 3):
        write(folder, facts(number), state(number))
    return folder


def test_nested_state_comes_back_exactly() -> None:
    """Types too: an optimizer's state has whole numbers for keys and a tuple of betas."""
    parameters = [torch.nn.Parameter(torch.rand(3, 2)) for _ in range(2)]
    optimizer = torch.optim.AdamW(parameters, lr=0.1 + 0.2, betas=(0.9, 0.999))
    for parameter in parameters:
        parameter.grad = torch.rand(3, 2)
    optimizer.step()
    given = {
        "o": optimizer.state_dict(),
        "l": [1, (2.5, None, True), "x", {}],
        "f": float("inf"),
        "t": torch.tensor(7, dtype=torch.bfloat16),
    }

    tensors, plan = flatten(given)
    found = unflatten(tensors, json.loads(json.dumps(plan, allow_nan=False)))

    assert list(found["o"]["state"]) == [0, 1]
    assert type(found["o"]["param_groups"][0]["betas"]) is tuple
    assert found["o"]["param_groups"] == given["o"]["param_groups"]  # type: ignore[index]
    assert (found["l"], found["f"]) == (given["l"], given["f"])
    assert torch.equal(
        found["o"]["state"][1]["exp_avg_sq"], optimizer.state[parameters[1]]["exp_avg_sq"]
    )
    assert found["t"].dtype == torch.bfloat16
    with pytest.raises(TypeError, match="'x' holds a set|/x holds a set"):
        flatten({"x": {1}})
    with pytest.raises(ValueError, match="do not fit"):
        unflatten({}, plan)


def test_what_is_written_is_read(run: Path) -> None:
    found = read(run / "checkpoints" / "round-0003")

    assert found.facts == facts(3)
    assert torch.equal(found.state["trunk"]["w"], torch.full((3,), 3.0))
    assert sorted(p.name for p in found.folder.iterdir()) == ["state.json", "tensors.safetensors"]


STAGES = [
    ("flower_app.runs.checkpoint.save_file", None),
    ("flower_app.runs.checkpoint._digest", None),
    ("flower_app.runs.checkpoint.json.dumps", None),
    *[("flower_app.runs.checkpoint.os.fsync", nth) for nth in range(4)],
    ("pathlib.Path.rename", None),
]


@pytest.mark.parametrize("problem", [Killed(), FULL])
@pytest.mark.parametrize(("where", "nth"), STAGES)
def test_a_kill_at_any_moment_leaves_the_one_before_whole(
    where: str, nth: int | None, problem: BaseException, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def fail(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > (nth or 0):
            raise problem

    with monkeypatch.context() as patch:
        patch.setattr(where, fail)
        with pytest.raises(type(problem)):
            write(run, facts(4), state(4))

    drafts = [p for p in (run / "checkpoints").iterdir() if p.name.startswith(".")]
    if problem is FULL:
        assert not drafts, "what was begun takes the space that is lacking"
    number, newest = folders(run)[-1]
    assert number in (3, 4)
    assert torch.equal(read(newest).state["trunk"]["w"], torch.full((3,), float(number)))
    write(run, facts(4), state(4))
    assert [p.name for p in sorted((run / "checkpoints").iterdir())] == [
        f"round-000{n}" for n in (1, 2, 3, 4)
    ]


def damage(path: Path, how: str) -> None:
    tensors, told = path / "tensors.safetensors", path / "state.json"
    if how == "flipped bit":
        data = bytearray(tensors.read_bytes())
        data[-1] ^= 1
        tensors.write_bytes(data)
    elif how == "cut off":
        os.truncate(tensors, tensors.stat().st_size - 3)
    elif how == "no tensors":
        tensors.unlink()
    elif how == "no state":
        told.unlink()
    elif how == "changed state":
        told.write_text(told.read_text().replace('"seconds": 1.5', '"seconds": 2.5'))
    else:
        told.write_text(told.read_text()[:-40])


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("flipped bit", "tensors.safetensors has changed since it was written"),
        ("cut off", r"tensors.safetensors has \d+ bytes, \d+ were written"),
        ("no tensors", "tensors.safetensors is missing"),
        ("no state", "has no state.json"),
        ("changed state", "state.json has changed since it was written"),
        ("half a state", "state.json is no JSON"),
    ],
)
def test_a_damaged_checkpoint_is_refused_and_the_one_before_offered(
    how: str, words: str, run: Path
) -> None:
    newest, before = run / "checkpoints" / "round-0003", run / "checkpoints" / "round-0002"
    damage(newest, how)

    for named in (run, newest):
        with pytest.raises(Damaged, match=words) as caught:
            take_up(str(named))
        assert f"{newest}" in str(caught.value)
        assert f"The one before it is whole: resume='{before}'" in str(caught.value)
    assert look_up(str(before)).number == 2
    damage(before, "flipped bit")
    with pytest.raises(Damaged, match="resume='.*round-0001'"):
        take_up(str(run))
    damage(run / "checkpoints" / "round-0001", "cut off")
    with pytest.raises(Damaged, match="none before it that is whole; begin anew: graft run"):
        take_up(str(run))


def rewritten(path: Path, **changes: Any) -> None:
    """State that is whole and says something else."""
    told = {**json.loads((path / "state.json").read_text()), **changes}
    del told["checksum"]
    told = {"checksum": checkpoint._checksum(told), **told}
    (path / "state.json").write_text(json.dumps(told))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": 9}, "has format 9, and this Graft reads 1"),
        ({"graft": "9.9"}, "was written by Graft 9.9, and this is"),
        ({"config": {"train": {"lrr": 1}}}, "holds a configuration that is no more.*'train.lr'"),
    ],
)
def test_another_grafts_checkpoint_is_refused(
    changes: dict[str, Any], words: str, run: Path
) -> None:
    rewritten(run / "checkpoints" / "round-0003", **changes)

    with pytest.raises(ValueError, match=words):
        take_up(str(run))


def test_a_checkpoint_from_before_a_key_had_its_name_goes_on(run: Path) -> None:
    """As a configuration's file does, and says so."""
    config = to_dict(
        Config(model=replace(Config().model, path="/m"), link=LinkConfig(codec="bf16"))
    )
    del config["link"]["codec"], config["link"]["window"]
    config["link"]["dtype"] = "bf16"
    rewritten(run / "checkpoints" / "round-0003", config=config)

    point = look_up(str(run), "train.rounds=9")

    assert set(point.config.link.codec.values()) == {"bf16"}
    assert point.config.link.window == 4
    assert "link.dtype is link.codec now" in point.notes[0]
    assert "link.window was not written down yet" in point.notes[1]


def test_a_folder_that_cannot_be_resumed_is_refused_in_words(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'nothing' is no run: no folder .*runs/nothing"):
        look_up("nothing")
    with pytest.raises(ValueError, match="is no folder; give its absolute path"):
        look_up(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="is no run folder: it has no config.yaml"):
        look_up(str(tmp_path))
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(ValueError, match=r"has no checkpoint: .*Begin it anew: graft run .*config"):
        look_up(str(run))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.lr=0.5", "train.lr was 0.001 and cannot become 0.5"),
        ("seed=1", "seed was 0 and cannot become 1"),
        ("link.codec=bf16", "link.codec was 'fp32' and cannot become 'bf16'"),
        ("output.folder=/x", "output.folder was '' and cannot become '/x'"),
        ("model.path=/other", "model.path was '/m' and cannot become '/other'"),
        ("train.rounds=8", "train.rounds was 9 and cannot become 8.*can only be raised"),
        ("train.lrr=1", "did you mean 'train.lr'"),
    ],
)
def test_changes_of_what_is_computed_are_refused(override: str, words: str, run: Path) -> None:
    with pytest.raises(ValueError, match=words):
        look_up(str(run), override)


def test_other_changes_are_taken(run: Path) -> None:
    changed = "link.timeout=70 runtime.trunk_threads=2 output.log_every=3 federation.quorum=0.5"

    point = look_up(str(run), f"{changed} train.rounds=12 train.lr=0.001")

    config = point.config
    assert (config.link.timeout, config.federation.quorum, config.train.rounds) == (70.0, 0.5, 12)
    assert point.notes == []


def test_one_process_writes_a_run_folder(run: Path) -> None:
    holder = RunLock(run)
    for attempt in (take_up, look_up):
        with pytest.raises(ValueError, match="is being written by another process"):
            attempt(str(run))
    holder.release()
    point = take_up(str(run))
    assert point.lock is not None
    with pytest.raises(ValueError, match="is being written by another process"):
        take_up(str(run))
    point.lock.release()


def test_the_last_and_the_best_are_kept(run: Path) -> None:
    for number, loss in ((4, 2.0), (5, 2.5), (6, None), (7, 2.4)):
        write(run, facts(number, loss=loss), state(number))
        checkpoint.prune(run, 2)

    assert [number for number, _ in folders(run)] == [4, 6, 7]


class Roster:
    clients = ("a",)


class Strategy:
    """What a Keeper asks."""

    roster = Roster()

    def __init__(self) -> None:
        self.losses = Losses(0)

    def state_dict(self) -> dict[str, Any]:
        return state()


def kept(tmp_path: Path, **output: Any) -> tuple[Keeper, Recorder, list[str]]:
    config = replace(
        Config(),
        model=replace(Config().model, path="/m"),
        train=replace(Config().train, rounds=7),
        output=OutputConfig(folder=str(tmp_path), keep_checkpoints=9, **output),
    )
    lines: list[str] = []
    writer = Recorder(config, say=lines.append)
    return Keeper(config, writer), writer, lines


@pytest.mark.parametrize(("every", "rounds"), [(0, []), (1, [1, 2, 3, 4, 5, 6, 7]), (3, [3, 6, 7])])
def test_checkpoints_come_every_k_rounds_and_at_the_end(
    every: int, rounds: list[int], tmp_path: Path
) -> None:
    keep, writer, _ = kept(tmp_path, checkpoint_every=every)
    for number in range(1, 8):
        keep(number, Strategy())  # type: ignore[arg-type]
    assert [number for number, _ in folders(writer.folder)] == rounds


def test_a_full_disk_costs_a_checkpoint_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    keep, writer, _ = kept(tmp_path, checkpoint_every=2)

    def full(*args: Any) -> None:
        raise FULL

    keep(2, Strategy())  # type: ignore[arg-type]
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        keep(4, Strategy())  # type: ignore[arg-type]
    keep(5, Strategy())  # type: ignore[arg-type]

    assert [number for number, _ in folders(writer.folder)] == [2, 5]
    (told,) = caplog.messages
    assert "no checkpoint of round 4: [Errno 28] No space left on device" in told
    assert "the last checkpoint is that of round 2; free space" in told
    assert "output.checkpoint_every=0" in told


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB, where this user may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "graft", str(disk)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting takes rights that this user has not")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_is_really_full(tiny_disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The records and two checkpoints fit, a third does not, and then there is space again."""
    keep, writer, _ = kept(tiny_disk)
    strategy = Strategy()
    strategy.state_dict = lambda: {"w": torch.rand(25_000)}  # type: ignore[method-assign]

    journal = writer._journal._journal
    assert journal is not None
    for number in (1, 2, 3, 4):
        keep(number, strategy)  # type: ignore[arg-type]
    filler = tiny_disk / "filler"
    with pytest.raises(OSError, match="No space"):
        filler.write_bytes(b"x" * 300_000)
    for number in range(100):
        journal.write(json.dumps({"kind": "round", "round": number, "text": "x" * 100}))
    in_memory = len(journal._owed)
    filler.unlink()
    checkpoint.remove(writer.folder / "checkpoints" / "round-0001")
    keep(5, strategy)  # type: ignore[arg-type]
    writer.finish()

    assert [number for number, _ in folders(writer.folder)] == [2, 5]
    assert read(writer.folder / "checkpoints" / "round-0005").facts.round == 5
    warned = [line for line in caplog.messages if "No space left on device" in line]
    assert sum("checkpoint" in line for line in warned) == 2
    assert in_memory > 0
    written = cut_back(writer.folder / "metrics.jsonl", 1000)
    assert [record["round"] for record in written[1:]] == list(range(100))


def test_records_outlive_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A disk that takes half a line, then none; then there is space again."""
    said: list[str] = []
    journal, real, room = Journal(tmp_path / "m.jsonl", said.append), os.write, [3, 0, 0]

    def write(handle: int, data: Any) -> int:
        if not room:
            return real(handle, data)
        if count := room.pop(0):
            return real(handle, data[:count])
        raise FULL

    journal.write('{"round": 0}')
    monkeypatch.setattr("flower_app.runs.journal.os.write", write)
    for number in (1, 2, 3):
        journal.write(f'{{"round": {number}}}')
    journal.close()

    assert [record["round"] for record in cut_back(tmp_path / "m.jsonl", 9)] == [0, 1, 2, 3]
    (warned,), (told,) = caplog.messages, said
    assert "No space left on device. The run goes on" in warned
    assert "can be written again; nothing is lost" in told


def test_a_full_disk_at_the_end_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, writer, lines = kept(tmp_path)

    def full(*args: Any) -> None:
        raise FULL

    monkeypatch.setattr(recorder, "replace_whole", full)
    with pytest.raises(RuntimeError, match=r"complete, but .*No space left.*free space and resume"):
        writer.finish()
    _, writer, lines = kept_failing(tmp_path)
    writer.fail("the cause")
    assert "failed: the cause" in lines


def kept_failing(tmp_path: Path) -> tuple[Keeper, Recorder, list[str]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recorder, "replace_whole", lambda *args: None)
        return kept(tmp_path)


def test_cutting_back_drops_later_rounds_and_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"kind": "round", "round": number}) for number in range(4)]
    path.write_text("\n".join(lines) + '\n{"kind": "st', encoding="utf-8")

    found = cut_back(path, 2)

    assert [record["round"] for record in found] == [0, 1, 2]
    assert path.read_text(encoding="utf-8").splitlines() == lines[:3]
    path.write_text('{"round": 0}\n{"rou\n{"round": 1}\n')
    with pytest.raises(ValueError, match="line 2 is no record"):
        cut_back(path, 2)


def test_versions_agree(project: Path) -> None:
    assert f'version = "{VERSION}"' in (project / "pyproject.toml").read_text()
