"""The demo judges a run by what it left, and forgives Ray a late start once."""

from __future__ import annotations

import contextlib
import json
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from conf.load import load_config, to_dict
from conf.rules import ConfigError
from flower_app.runs.checkpoint import Facts, write
from simulations.launch import run as tool
from simulations.launch.console import Console
from simulations.launch.local_flower import COMPLETED, Outcome
from simulations.launch.machine import Machine


class _Flower:
    """Answers `run` with prepared outcomes."""

    def __init__(self, outcomes: list[Outcome]) -> None:
        self.outcomes, self.runs = outcomes, 0

    def run(self, *arguments: Any, **options: Any) -> Outcome:
        self.runs += 1
        return self.outcomes[self.runs - 1]


def _outcome(folder: Path | None = None, line: str = "", **summary: Any) -> Outcome:
    if folder is not None:
        (folder / "summary.json").write_text(json.dumps(summary))
    return Outcome(
        run_id="1",
        status=COMPLETED if folder else "finished:failed",
        details="N/A" if folder else "Simulation failed",
        folder=folder,
        lines=[line],
    )


def _bring(monkeypatch: pytest.MonkeyPatch, *outcomes: Outcome) -> _Flower:
    flower = _Flower(list(outcomes))

    @contextlib.contextmanager
    def superlink() -> Iterator[_Flower]:
        yield flower

    monkeypatch.setattr(tool, "local_superlink", superlink)
    return flower


GOOD = {
    "eval_loss_first": 5.5,
    "eval_loss_last": 2.5,
    "eval_perplexity_last": 12.2,
    "rounds": 3,
    "clients": 2,
}


def test_demo_says_where_the_results_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _bring(monkeypatch, _outcome(tmp_path, **GOOD))
    lines: list[str] = []
    assert tool.demo(lines.append) == tmp_path
    assert any(str(tmp_path) in line for line in lines)
    assert any("5.500 -> 2.500" in line for line in lines)


def test_demo_ends_with_commands_that_go_on_and_one_that_talks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "a run"
    folder.mkdir()
    _bring(monkeypatch, _outcome(folder, **GOOD))
    lines: list[str] = []
    tool.demo(lines.append)

    resume, lora, parity, chat = [shlex.split(line, comments=True) for line in lines[-4:]]
    assert resume[1:] == ["resume", str(folder), "train.rounds=5"]
    assert lora[1:] == ["run", "lora", f"model.path={folder}/model"]
    assert parity[1:] == ["parity", "--model", f"{folder}/model", "--cut", "2,1"]
    assert chat[1:] == ["chat", str(folder)]
    assert {Path(command[0]).name for command in (resume, lora, parity, chat)} == {"graft"}
    assert shutil.which(resume[0]), "it can be typed as it is"


@pytest.mark.parametrize(("last", "words"), [(4.0, "a fall of 2 nats"), (None, "no held-out loss")])
def test_demo_that_learned_too_little_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, last: float | None, words: str
) -> None:
    _bring(monkeypatch, _outcome(tmp_path, **{**GOOD, "eval_loss_last": last}))
    with pytest.raises(RuntimeError, match=words):
        tool.demo(lambda line: None)


def test_failed_run_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    flower = _bring(monkeypatch, _outcome(line="ValueError: boom"), _outcome())
    with pytest.raises(RuntimeError, match="did not complete: Simulation failed"):
        tool.run_experiment("demo", say=lambda line: None)
    assert flower.runs == 1


def test_late_ray_gets_one_more_chance(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    late = _outcome(line=f"Exception: {tool.RAY_LATE}. This could happen because")
    flower = _bring(monkeypatch, late, _outcome(tmp_path, **GOOD))
    assert tool.run_experiment("demo", say=lambda line: None).folder == tmp_path
    assert flower.runs == 2
    _bring(monkeypatch, late, late)
    with pytest.raises(RuntimeError, match="did not complete"):
        tool.run_experiment("demo", say=lambda line: None)


def test_wrong_configuration_starts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    flower = _bring(monkeypatch)
    with pytest.raises(ConfigError, match="did you mean"):
        tool.run_experiment("demo", "train.lrr=1", say=lambda line: None)
    assert flower.runs == 0


@pytest.mark.parametrize(
    ("experiment", "overrides", "words"),
    [
        ("lora", "", "no finished run of experiment 'demo'.*make demo"),
        ("demo", "cut.bottom=3 cut.top=3", "the model has 6 blocks, bottom=3 . top=3"),
        ("lora", "model.path=/no/such/model", "model.path /no/such/model does not exist"),
        ("demo", "data.source=files data.partitioner=iid", "needs data.path in a simulation"),
        ("deployment", "data.path=here.txt", "data.path is the relative path 'here.txt'"),
        ("deployment", "data.path=/no/such/file.txt", "data.path /no/such/file.txt does not exist"),
        ("demo", "output.folder=/dev/null/runs", "output.folder /dev/null/runs cannot be written"),
        ("demo", "model.tokenizer=/no/such/one", "model.tokenizer /no/such/one does not exist"),
        ("demo", "federation.min_clients=3", "min_clients=3 waits for more clients than the 2"),
        ("demo", "runtime.trunk_device=cuda:64", "runtime.trunk_device=cuda:64: torch .* CUDA"),
        ("demo", "runtime.client_device=abacus", "runtime.client_device: Expected one of cpu"),
        (
            "demo",
            "link.tls=on link.certificate=/no/c link.key=/no/k",
            "link.certificate /no/c does",
        ),
        ("demo", "link.tls=on link.certificate=c link.key=k", "certificate is the relative path"),
        ("demo", "link.bind=192.0.2.1:9393", "link.bind=192.0.2.1:9393: another program has"),
        ("deployment", "data.path=/dev/null", "/dev/null"),
    ],
)
def test_mistake_is_found_before_flower_is_started(
    monkeypatch: pytest.MonkeyPatch, experiment: str, overrides: str, words: str
) -> None:
    flower, lines = _bring(monkeypatch), list[str]()
    with pytest.raises(ValueError, match=words):
        tool.run_experiment(experiment, overrides, say=lines.append)
    assert (flower.runs, lines) == (0, [])


def test_what_a_machine_lacks_is_said_before_flower_is_started(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lacking = Machine(cpus=1, temporary=Path("/tmp"), shared_memory=0, disk=0)
    monkeypatch.setattr(tool, "look_at_machine", lambda: lacking)
    flower, lines = _bring(monkeypatch, _outcome(tmp_path, **GOOD)), list[str]()
    with pytest.raises(ConfigError, match="has 0 MB free, and a run needs 512"):
        tool.run_experiment("demo", say=lines.append)
    assert (flower.runs, lines) == (0, [])

    monkeypatch.setattr(tool, "look_at_machine", lambda: replace(lacking, disk=2**40))
    tool.run_experiment("demo", say=lines.append)
    assert "--shm-size=1g" in lines[0]


def test_documents_are_counted_before_flower_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    flower = _bring(monkeypatch)
    with pytest.raises(ValueError, match="289 documents cannot be divided among 500 clients"):
        tool.run_experiment("demo", clients=500, say=lambda line: None)
    assert flower.runs == 0


def test_data_that_cannot_be_read_is_found_before(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _bring(monkeypatch)
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "a"}\nnot json\n')
    with pytest.raises(ValueError, match="line 2"):
        tool.run_experiment("deployment", f"data.path={path}", say=lambda line: None)


def test_cut_is_checked_against_a_checkpoint(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _bring(monkeypatch)
    config = {"model_type": "llama", "num_hidden_layers": 3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"any": torch.zeros(1)}, tmp_path / "model.safetensors")  # not read for it
    with pytest.raises(ValueError, match="the model has 3 blocks"):
        tool.run_experiment("lora", f"model.path={tmp_path} cut.bottom=2", say=lambda line: None)


@pytest.mark.parametrize("end", [KeyboardInterrupt, SystemExit])
def test_stopped_run_says_what_there_is(
    monkeypatch: pytest.MonkeyPatch, end: type[BaseException]
) -> None:
    class Stopped(_Flower):
        def run(self, *arguments: Any, **options: Any) -> Outcome:
            options["echo"]("run folder: /runs/x")
            raise end

    @contextlib.contextmanager
    def superlink() -> Iterator[_Flower]:
        yield Stopped([])

    monkeypatch.setattr(tool, "local_superlink", superlink)
    lines: list[str] = []
    with pytest.raises(end):
        tool.run_experiment("demo", say=lines.append)
    assert lines[-1] == "stopped; what there is: /runs/x"


FAILED_RUN = """\
run folder: /runs/x
Traceback (most recent call last):
  File "a.py", line 1, in run
    result = strategy.start(
             ^^^^^^^^^^^^^^^
  round 1/3  client-0  step   10/40  loss 3.4
round 1/3 | train loss 3.4
    raise RuntimeError(
RuntimeError: never said elsewhere
failed: ValueError: no data at /x
2026-11-23 17:40:01,123\tERROR services.py:1350 -- Failed to start the dashboard
ERROR :     Simulation raised an exception
(ClientAppActor pid=12) Traceback (most recent call last):
(ClientAppActor pid=12)   File "b.py", line 2, in train
ray::ClientAppActor.run() (pid=12, ip=127.0.0.1)
  File "c.py", line 3, in run

The above exception was the direct cause of the following exception:

Traceback (most recent call last):
  File "d.py", line 4, in main
ValueError: no data at /x
ERROR :     Exit Code: 700
An unhandled exception occurred when running the simulation.
For more information, visit: <https://flower.ai/docs/700.html>"""


def test_failure_stands_out_of_its_tracebacks() -> None:
    shown: list[str] = []
    console = Console(shown.append)
    for line in FAILED_RUN.splitlines():
        console(line)
    assert shown == [
        "run folder: /runs/x",
        "  round 1/3  client-0  step   10/40  loss 3.4",
        "round 1/3 | train loss 3.4",
        "RuntimeError: never said elsewhere",
        "failed: ValueError: no data at /x",
    ]
    assert console.folder == Path("/runs/x")


def test_verbose_console_shows_everything() -> None:
    shown: list[str] = []
    for line in FAILED_RUN.splitlines():
        Console(shown.append, verbose=True)(line)
    assert shown == FAILED_RUN.splitlines()


@pytest.mark.parametrize(("cpus", "told"), [(1, "init-args-num-cpus=1"), (2, "num-supernodes=3")])
def test_one_cpu_is_enough(cpus: int, told: str) -> None:
    assert tool._federation(load_config("demo"), 3, cpus=cpus).endswith(told)


@pytest.mark.parametrize(
    ("changes", "together"),
    [
        ("", False),
        ("train.strategy=merged", True),
        ("train.strategy=splitfed-v2", False),
        ("train.strategy=splitfed-v2 train.turns=ordered", True),
        ("train.strategy=splitfed-v2 train.turns=ordered link.transport=messages", False),
    ],
)
def test_clients_that_wait_for_each_other_run_at_once(changes: str, together: bool) -> None:
    told = tool._federation(load_config("demo", changes), 3, cpus=2)

    assert told.startswith("num-supernodes=3")
    assert ("init-args-num-cpus=3" in told) == together


def test_a_run_is_resumed_with_as_many_clients_as_it_had(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").touch()
    config = to_dict(load_config("demo", "train.rounds=9"))
    facts = Facts(round=2, config=config, clients=["a", "b", "c"], loss=None, started="", seconds=0)
    write(run, facts, {})
    given: list[Any] = []

    class Flower(_Flower):
        def run(self, *arguments: Any, **options: Any) -> Outcome:
            given.append((arguments, options))
            return super().run(*arguments, **options)

    flower = Flower([_outcome(run, **GOOD)])

    @contextlib.contextmanager
    def superlink() -> Iterator[_Flower]:
        yield flower

    monkeypatch.setattr(tool, "local_superlink", superlink)
    said: list[str] = []
    tool.resume_run(str(run), "link.timeout=70", say=said.append)

    ((arguments, options),) = given
    assert arguments == ("demo", "link.timeout=70")
    assert (options["resume"], options["federation"]) == (str(run), "num-supernodes=3")
    assert f"go on with {run} after round 2 of 9" in said[0]
    with pytest.raises(ConfigError, match="train.lr was 0.004 and cannot become 1.0"):
        tool.resume_run(str(run), "train.lr=1", say=said.append)
    assert len(given) == 1, "nothing is started for a run that cannot go on"
