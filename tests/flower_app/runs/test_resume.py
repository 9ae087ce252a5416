"""A run that was killed and resumed equals, bit for bit, one that never was.

The clients are the real ClientApp; everything on the server is built anew from the disk.
"""

from __future__ import annotations

import json
import logging
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.supercore.task_identity import TaskIdentity
from safetensors.torch import load_file

from conf.load import load_config
from conf.schema import Config
from flower_app.build import resolve_model
from flower_app.runs import checkpoint
from flower_app.runs.folders import find_last_run, folders
from flower_app.runs.history import read_history
from flower_app.runs.plots import plot_loss
from flower_app.runs.recorder import Recorder
from flower_app.runs.resume import look_up, take_up
from flower_app.server_app import run_experiment
from strategies.transport.codec.registry import codecs
from tests.flower_app import test_app
from tests.flower_app.grid import InProcessGrid

ROUNDS = "train.rounds=4 train.local_steps=2 train.lr=0.01 train.schedule=cosine train.warmup=0.1"
LORA = "tuning.bottom=lora tuning.trunk=lora tuning.top=lora lora.rank=2 train.lr=0.05"


class Killed(BaseException):
    """The process is gone: nothing of it goes on, and the system takes its locks back."""


@pytest.fixture(autouse=True)
def _flower_task(one_thread: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    # Pictures take longer than these runs.
    monkeypatch.setattr("flower_app.runs.recorder.plot_loss", lambda folder: None)


def configured(tmp_path: Path, changes: str = "") -> Config:
    return resolve_model(test_app.tiny_config(tmp_path, f"{ROUNDS} {changes}"))


def run(config: Config, grid: InProcessGrid, lines: list[str] | None = None) -> Path:
    """A run from its start; the folder."""
    return _work(Recorder(config, say=(lines if lines is not None else []).append), config, grid)


def resume(folder: Path, grid: InProcessGrid, overrides: str = "", lines: Any = None) -> Path:
    """What a new ServerApp does with `resume`."""
    point = take_up(str(folder), overrides)
    recorder = Recorder(point.config, say=(lines if lines is not None else []).append, point=point)
    return _work(recorder, point.config, grid, point)


def _work(recorder: Recorder, config: Config, grid: InProcessGrid, point: Any = None) -> Path:
    recorder.start()
    try:
        recorder.finish(run_experiment(config, grid, recorder, point))
    except Killed:
        recorder._alone.release()
        recorder._journal.finish({})
    return recorder.folder


def killing(grid: InProcessGrid, round: int, message: str = "train", nth: int = 2) -> InProcessGrid:
    """Let the server die when it reaches the n-th client in a round."""
    seen = 0

    def meanwhile(sent: Any) -> None:
        nonlocal seen
        ticket = sent.content.config_records["ticket"]
        seen += sent.metadata.message_type == message and ticket["round"] == round
        if seen == nth:
            raise Killed

    grid.meanwhile = meanwhile
    return grid


def records(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def curve(folder: Path) -> list[tuple[Any, ...]]:
    """Every loss of the run and what goes with it, exactly, whoever was recorded first."""
    found = [
        (r["round"], 0, r["client"], r["step"], r["loss"], r["grad_norm"], r["lr"], r["tokens"])
        if r["kind"] == "step"
        else (r["round"], 1, r["train"], r["evaluate"], r["clients"], r["tokens"])
        for r in records(folder)
        if r["kind"] in ("step", "trained", "round")
    ]
    return sorted(found, key=lambda entry: entry[: 2 if entry[1] else 4])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in (folder / "model").glob("*.safetensors"):
        found |= load_file(path)
    return found


def assert_equal_runs(one: Path, other: Path) -> None:
    left, right = weights(one), weights(other)
    assert left
    assert left.keys() == right.keys()
    assert not [name for name in left if not torch.equal(left[name], right[name])]
    assert curve(one) == curve(other)


CASES = {
    "v1": "",
    "v2": "train.strategy=splitfed-v2",
    "v2, momentum": "train.strategy=splitfed-v2 train.optimizer=sgd train.momentum=0.9",
    "v2, messages": "train.strategy=splitfed-v2 link.transport=messages train.turns=ordered",
    "v1, messages, dropout": "link.transport=messages model.scratch.attention_dropout=0.2",
    "merged": "train.strategy=merged link.transport=messages",
    "merged, step": "train.strategy=merged train.sync=step link.transport=messages",
    "merged, global batch": (
        "train.strategy=merged train.sync=step link.transport=messages train.global_batch=6 "
        "train.local_steps=3"
    ),
    "dropout, few": (
        "model.scratch.attention_dropout=0.2 federation.fraction_train=0.5 "
        "federation.fraction_evaluate=0.5 federation.oversample=0.25 federation.retries=1"
    ),
    "prox, accumulate": "train.prox=0.1 train.accumulate=2",
    "fedadam": "aggregation.optimizer=fedadam",
    "fedyogi, v2": "aggregation.optimizer=fedyogi train.strategy=splitfed-v2",
    "fedavgm": "aggregation.optimizer=fedavgm",
    "bf16": "model.dtype=bf16",
    "lora": f"{LORA} lora.dropout=0.2",
    "lora, v2": f"{LORA} train.strategy=splitfed-v2",
    "lora, exact": f"{LORA} aggregation.lora=exact",
    "lora, exact, v2": f"{LORA} aggregation.lora=exact train.strategy=splitfed-v2",
    "lora, svd": f"{LORA} aggregation.lora=svd",
    "lora, ffa": f"{LORA} aggregation.lora=ffa",
    "trunk frozen": "train.strategy=splitfed-v2 tuning.trunk=frozen",
}


FAST = ("v2", "merged, step", "dropout, few", "fedadam", "lora, exact")
CODECS = {
    **{f"codec {name}": f"link.codec={name}" for name in codecs()},
    "codec klt, messages": "link.codec=klt link.transport=messages",
    "a codec for each": "link.codec.h1=klt link.codec.h2=int4 link.codec.grad_h2=int2",
}
"""Each of them, and klt, whose state travels, over messages too."""
PARAMS = [
    pytest.param(changes, id=name, marks=[] if name in FAST else pytest.mark.slow)
    for name, changes in (CASES | CODECS).items()
]


@pytest.mark.parametrize("changes", PARAMS)
def test_a_killed_run_goes_on_as_if_nothing_had_been(changes: str, tmp_path: Path) -> None:
    """Killed within round 3, when one client has trained; other node ids and a new state after."""
    config = configured(tmp_path, changes)
    clients = 4 if "fraction" in changes else 2

    smooth = run(config, InProcessGrid(clients))
    broken = run(config, killing(InProcessGrid(clients), 3))
    before = curve(broken)
    resume(broken, InProcessGrid(clients, first_id=5000))

    assert max(entry[0] for entry in before) in (2, 3)
    assert before != curve(smooth)
    assert_equal_runs(broken, smooth)


@pytest.mark.slow
def test_mixed_ranks_and_cuts_go_on_too(tmp_path: Path) -> None:
    """Heterogeneous clients under exact averaging: what is held has the widest rank."""

    def grid() -> InProcessGrid:
        own = [{}, {"lora-rank": 3}, {"cut-bottom": 2, "lora-rank": 1}]
        nodes = {n: {"partition-id": n, "num-partitions": 3, **more} for n, more in enumerate(own)}
        return InProcessGrid(3, node_configs=nodes)

    config = configured(tmp_path, f"{LORA} aggregation.lora=exact")

    smooth = run(config, grid())
    broken = run(config, killing(grid(), 3))
    resume(broken, grid())

    assert_equal_runs(broken, smooth)


@pytest.mark.slow
@pytest.mark.parametrize("round", [2, 4])
@pytest.mark.parametrize("message", ["train", "evaluate"])
def test_it_may_be_killed_anywhere(round: int, message: str, tmp_path: Path) -> None:
    config = configured(tmp_path, "train.strategy=splitfed-v2")

    smooth = run(config, InProcessGrid(2))
    broken = run(config, killing(InProcessGrid(2), round, message))
    resume(broken, InProcessGrid(2))

    assert_equal_runs(broken, smooth)


@pytest.mark.slow
def test_it_may_be_killed_again_and_again(tmp_path: Path) -> None:
    config = configured(tmp_path, "train.strategy=splitfed-v2 aggregation.optimizer=fedadam")

    smooth = run(config, InProcessGrid(2))
    broken = run(config, killing(InProcessGrid(2), 2))
    for round in (2, 3, 4):
        resume(broken, killing(InProcessGrid(2), round, "evaluate"))
    resume(broken, InProcessGrid(2))

    assert_equal_runs(broken, smooth)
    assert [r["round"] for r in records(broken) if r["kind"] == "resume"] == [1, 1, 2, 3]


@pytest.mark.parametrize("round", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_kill_in_an_evaluation_costs_no_training(round: int, tmp_path: Path) -> None:
    """The round is on disk before; its evaluation, which nobody has seen, is made up for."""
    config = configured(tmp_path, "aggregation.optimizer=fedadam output.keep_checkpoints=1")
    grid = InProcessGrid(2, first_id=5000)

    smooth = run(config, InProcessGrid(2))
    broken = run(config, killing(InProcessGrid(2), round, "evaluate"))
    kept = [number for number, _ in folders(broken)]
    (before,) = (r for r in records(broken) if (r["kind"], r["round"]) == ("trained", round))
    (broken / "summary.json").unlink(missing_ok=True)
    resume(broken, grid)

    assert kept[-1] == round
    assert before["train"]["loss"] > 0
    assert before["evaluate"] is None
    tickets = [m for m in grid.seen if m.metadata.message_type == "train"]
    assert {m.content.config_records["ticket"]["round"] for m in tickets} == {*range(round + 1, 5)}
    assert_equal_runs(broken, smooth)
    states = [
        [json.loads((path / "state.json").read_text()) for _, path in folders(folder)]
        for folder in (broken, smooth)
    ]
    one, other = ([(s["round"], s["loss"], s["tensors"]) for s in told] for told in states)
    assert one == other


def test_a_report_that_its_checkpoint_does_not_know_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the round's line and the last word of its checkpoint."""
    config = configured(tmp_path)
    smooth = run(config, InProcessGrid(2))

    def killed(*args: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "amend", killed)
        broken = run(config, InProcessGrid(2))
    assert records(broken)[-1]["kind"] == "round"
    resume(broken, InProcessGrid(2))

    assert_equal_runs(broken, smooth)


def test_the_summary_covers_the_whole_run(tmp_path: Path) -> None:
    config, lines = configured(tmp_path), []

    smooth = run(config, InProcessGrid(2))
    broken = run(config, killing(InProcessGrid(2), 3))
    (broken / "metrics.jsonl").open("a").write('{"kind": "st')  # what a kill may leave
    again = resume(broken, InProcessGrid(2), lines=lines)

    told, wanted = (json.loads((f / "summary.json").read_text()) for f in (broken, smooth))
    for key in ("rounds", "clients", "tokens", "bytes_up", "eval_loss_first", "eval_loss_last"):
        assert told[key] == wanted[key]
    assert told["resumed"] == [2]
    assert told["started"] < told["finished"]
    assert again == broken
    assert lines[0] == lines[-1] == f"run folder: {broken}"
    assert lines[1] == "going on after round 2 of 4"
    history = read_history(broken)
    assert (history.status, len(history.resumes), history.planned) == ("finished", 1, 4)
    assert len(history.steps) == len(read_history(smooth).steps) == 4 * 2 * 2
    assert plot_loss(history).stat().st_size > 5000


def test_a_run_killed_before_its_model_was_saved_only_saves_it(tmp_path: Path) -> None:
    config, grid = configured(tmp_path), InProcessGrid(2)

    folder = run(config, InProcessGrid(2))
    saved = weights(folder)
    (folder / "summary.json").unlink()
    (folder / "model" / "model.safetensors").unlink()
    resume(folder, grid)

    assert not grid.seen
    assert all(torch.equal(saved[name], tensor) for name, tensor in weights(folder).items())


def test_rounds_may_be_added_and_a_constant_rate_makes_it_the_longer_run(tmp_path: Path) -> None:
    changes = "train.schedule=constant train.warmup=0 train.strategy=splitfed-v2"
    longer = run(configured(tmp_path, changes), InProcessGrid(2))
    folder = run(configured(tmp_path, f"{changes} train.rounds=2"), InProcessGrid(2))

    with pytest.raises(ValueError, match=r"is finished: all 2 rounds.*raise train.rounds"):
        look_up(str(folder))
    resume(folder, InProcessGrid(2), "train.rounds=4 output.log_every=3 runtime.trunk_threads=1")

    assert_equal_runs(folder, longer)
    assert "rounds: 4" in (folder / "config.yaml").read_text()


def test_an_earlier_checkpoint_may_be_named_and_what_came_after_it_goes(tmp_path: Path) -> None:
    config = configured(tmp_path, "output.keep_checkpoints=4 train.strategy=splitfed-v2")
    smooth = run(config, InProcessGrid(2))
    wanted = curve(smooth), weights(smooth)

    resume(smooth / "checkpoints" / "round-0001", killing(InProcessGrid(2), 3))

    assert [number for number, _ in folders(smooth)] == [1, 2]
    resume(smooth, InProcessGrid(2))
    assert curve(smooth) == wanted[0]
    assert all(torch.equal(wanted[1][name], tensor) for name, tensor in weights(smooth).items())


def test_other_clients_than_before_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken = run(configured(tmp_path), killing(InProcessGrid(3), 3))

    with caplog.at_level(logging.WARNING):
        resume(broken, InProcessGrid(3, present={0, 1}))
        assert "missing client-2; new none" in caplog.text
    assert "federation.min_clients=3" in caplog.text


def fingerprint(folder: Path) -> dict[str, bytes]:
    """Every file of a run folder."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize("trouble", ["the model has changed", "the port is taken"])
def test_a_resume_that_fails_leaves_the_run_as_it_was(trouble: str, tmp_path: Path) -> None:
    """From a checkpoint before the last, too: what came after it goes only when rounds follow."""
    smooth = run(configured(tmp_path, "output.keep_checkpoints=9"), InProcessGrid(2))
    before, lines = fingerprint(smooth), list[str]()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        changes = f"link.bind=127.0.0.1:{port}" if "port" in trouble else ""
        point = take_up(str(smooth / "checkpoints" / "round-0001"), changes)
        if "model" in trouble:
            point.state["engine"]["trunk"].popitem()
        recorder = Recorder(point.config, say=lines.append, point=point)
        recorder.start()
        with pytest.raises(ValueError, match="does not fit|cannot listen") as error:
            run_experiment(point.config, InProcessGrid(2), recorder, point)
        recorder.fail(error.value)

    assert fingerprint(smooth) == before
    assert lines[-1] == f"not resumed, and nothing was changed in {smooth}"
    again = resume(smooth / "checkpoints" / "round-0001", InProcessGrid(2))  # the lock is free
    assert curve(again)


def test_a_model_that_has_changed_since_is_refused(tmp_path: Path) -> None:
    broken = run(configured(tmp_path), killing(InProcessGrid(2), 2))
    point = take_up(str(broken))
    point.state["engine"]["trunk"].popitem()

    with pytest.raises(ValueError, match=r"round 1 of .* does not fit this run's model: .*missing"):
        _work(
            Recorder(point.config, say=[].append, point=point),
            point.config,
            InProcessGrid(2),
            point,
        )


def test_a_run_goes_on_where_it_was_moved_to_with_the_run_it_builds_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # Prepare: adapters on the model of another run, killed; then all runs are somewhere else.
    old, new = tmp_path / "old" / "runs", tmp_path / "new" / "home" / "runs"
    short = f"output.folder={old} train.rounds=2 train.local_steps=1"
    base = run(configured(tmp_path, f"{short} train.rounds=1"), InProcessGrid(2))
    lora = f"{short} {LORA} model.path={base / 'model'} model.scratch={{}} model.tokenizer="
    smooth = run(configured(tmp_path, lora), InProcessGrid(2))
    broken = run(configured(tmp_path, lora), killing(InProcessGrid(2), 2))
    new.parent.mkdir(parents=True)
    shutil.move(old, new)

    # Execute
    resume(new / broken.name, InProcessGrid(2))

    # Assert
    assert_equal_runs(new / broken.name, new / smooth.name)
    assert f"is read from {new / base.name / 'model'}" in caplog.text
    assert load_config(str(new / broken.name / "config.yaml")).output.folder == str(new)
    assert not old.exists()
    again = load_config(str(new / smooth.name / "config.yaml"))
    assert again.model.path == str(new / base.name / "model")
    assert find_last_run("demo", new) == new / broken.name / "model"
    assert plot_loss(read_history(new / smooth.name)) == new / smooth.name / "loss.png"


def test_a_run_goes_on_where_it_was_moved_to_alone(tmp_path: Path) -> None:
    short = "train.rounds=2 train.local_steps=1"
    broken = run(configured(tmp_path, short), killing(InProcessGrid(2), 2))
    smooth = run(configured(tmp_path, short), InProcessGrid(2))
    moved = tmp_path / "another name"
    shutil.move(broken, moved)

    resume(moved, InProcessGrid(2))

    assert_equal_runs(moved, smooth)
    assert json.loads((moved / "summary.json").read_text())["model"] == "model"
