"""A report tells the numbers of the record, whatever its form and whatever the run went through."""

from __future__ import annotations

import csv
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from conf.schema import LinkConfig, TrainConfig
from simulations.cli.app import app
from simulations.report.report import write_report
from simulations.sweep.state import Point, Sweep, write_sweep
from tests.simulations.report.made import (
    HOSTILE,
    ended,
    line,
    round_,
    run_folder,
    small,
    step,
)


def numbers(*folders: Path, out: Path) -> dict[str, Any]:
    """The report of these runs, as JSON tells it."""
    (path,) = write_report([str(folder) for folder in folders], out / "all", ["json"])
    told: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return told


def page(*folders: Path, out: Path) -> str:
    """The HTML page, without plotly.js."""
    (path,) = write_report([str(folder) for folder in folders], out / "all", ["html"])
    text = path.read_text(encoding="utf-8")
    scripts = re.findall(r"(?s)<script[^>]*>.*?</script>", text)
    return text.replace(max(scripts, key=len), "")


def test_the_numbers_are_those_of_the_record(tmp_path: Path) -> None:
    (run,) = numbers(small(tmp_path), out=tmp_path)["runs"]

    summary = run["summary"]
    assert (summary["heldout_first"], summary["heldout_last"], summary["best_round"]) == (5, 3, 1)
    assert summary["perplexity_last"] == pytest.approx(math.exp(3))
    assert (summary["tokens"], summary["bytes_up"], summary["bytes_down"]) == (40, 6e6, 10e6)
    assert (summary["seconds"], summary["tokens_per_second"]) == (21, 40 / 21)
    first, second = run["rounds"]
    assert (first["evaluation_seconds"], first["tokens_so_far"], first["mb_so_far"]) == (10, 0, 2)
    assert (second["at"], second["steps_so_far"], second["tokens_so_far"]) == (20, 2, 40)
    assert second["mb_so_far"] == 2 + 14
    names = ("startup", "bottom", "network", "trunk", "top", "evaluation", "rest")
    parts = [second[f"{name}_seconds"] for name in names]
    assert parts == pytest.approx([0.5, 0.2, 0.4, 0.6, 0.8, 4, 10 - 2.5 - 4])
    assert run["environment"]["cpus"] == 2
    assert run["model"] == "a small model"


def test_an_attempt_that_was_undone_counts_for_nothing_but_is_told(tmp_path: Path) -> None:
    (run,) = numbers(small(tmp_path), out=tmp_path)["runs"]

    assert run["steps"]["loss"] == [5, 5, 4, 4]
    assert run["steps"]["tokens_so_far"] == [10, 20, 30, 40]
    assert run["steps"]["mb_so_far"] == [5, 8, 11, 14]
    labels = {each["label"]: each for each in run["participation"]}
    assert list(labels) == ["0 eval", "1.1 train", "1.2 train", "1 eval"]
    assert labels["1.1 train"]["outcomes"] == {"a": "undone", "b": "missing"}
    assert labels["1.1 train"]["at"] == 10
    a, b = run["clients"]
    assert (a["asked"], a["answered"], a["missing"], a["steps"], a["tokens"]) == (4, 3, 0, 2, 20)
    assert (b["asked"], b["answered"], b["missing"], b["bytes_down"]) == (4, 3, 1, 4e6)
    assert (a["train_loss"], a["seconds_per_step"]) == (4, pytest.approx(1))


def test_clients_whose_answers_do_not_count_add_no_tokens(tmp_path: Path) -> None:
    lost = {"asked": ["a", "b"], "clients": ["a"], "missing": {"b": "gone"}, "tokens": 10}
    lines = [
        step(1, 1, 1),
        step(1, 1, 2, "b", loss=50.0),
        round_(1, 3, None, **lost),
        step(2, 1, 4),
    ]
    (run,) = numbers(run_folder(tmp_path, "one", lines), out=tmp_path)["runs"]
    assert run["steps"]["tokens_so_far"] == [10, 10, 20]
    rows = [(r["round"], r["client"], r["outcome"], r["why"]) for r in run["client_rounds"]]
    assert rows[:2] == [(1, "a", "answered", ""), (1, "b", "missing", "gone")]
    assert (run["clients"][1]["tokens"], run["status"]) == (0, "unfinished")


def test_the_time_axis_of_a_resumed_run_has_no_gap(tmp_path: Path) -> None:
    lines = [line("start", 0, 0), step(1, 1, 5), round_(1, 10, 4.0)]
    lines += [line("resume", 1, 9_000), step(2, 1, 9_005), round_(2, 9_010, 3.0)]
    (run,) = numbers(run_folder(tmp_path, "one", lines), out=tmp_path)["runs"]
    assert run["steps"]["at"] == [5, 15]
    assert [each["at"] for each in run["rounds"]] == [10, 20]
    assert run["resumed_after"] == [1]


def test_what_the_server_and_each_client_measure_is_told(tmp_path: Path) -> None:
    """Losses on the server's own file, clients' held-out losses, and everybody's memory."""
    told = {
        "a": {"train": {"loss": 3.9, "num-tokens": 20, "peak-memory-mb": 700.0}},
        "b": {"evaluate": {"loss": 2.5, "num-tokens": 8, "peak-memory-mb": 900.0}},
    }
    memory = {"server_mb": 400.0, "server_peak_mb": 500.0}
    lines = [round_(1, 3, 3.0, central={"loss": 2.0}, per_client=told, memory=memory)]
    folder = run_folder(tmp_path, "one", lines)
    (run,) = numbers(folder, out=tmp_path)["runs"]

    assert (run["rounds"][0]["central_loss"], run["rounds"][0]["client_peak_mb"]) == (2, 900)
    assert (run["summary"]["server_peak_mb"], run["summary"]["client_peak_mb"]) == (500, 900)
    a, b = run["client_rounds"]
    assert (a["train_loss"], a["tokens"], a["heldout_loss"], a["peak_mb"]) == (3.9, 20, None, 700)
    assert (b["train_loss"], b["heldout_loss"], b["heldout_tokens"]) == (None, 2.5, 8)
    text = page(folder, out=tmp_path)
    for words in ("server&#39;s file", "Held-out loss of each client", "largest client&#39;s peak"):
        assert words in text, words


def test_every_room_of_the_page_is_there(tmp_path: Path) -> None:
    text = page(small(tmp_path), out=tmp_path)
    for words in ("Loss", "Perplexity", "Rounds", "Clients", "Traffic", "Time", "Participation"):
        assert re.search(rf"<h[23]>{words}</h[23]>", text), words
    for figure in ("loss", "perplexity", "clients", "traffic", "time", "participation"):
        assert f'data-chart="{figure}"' in text
    for words in ("5.0000 → 3.0000", "graft run ", "flwr run . --stream", "a small model", "cpus"):
        assert words in text
    assert "graft resume" not in text, "it is finished"
    links = re.findall(r"""(?:src|href)=["']([^"'#][^"']*)""", text)
    assert links == [], "nothing is fetched"


@pytest.mark.parametrize("form", ["html", "md"])
def test_what_strangers_say_is_no_markup(form: str, tmp_path: Path) -> None:
    """A client's name and error, the run's error, its folder."""
    lines = [
        step(1, 1, 1, HOSTILE),
        round_(1, 2, 3.0, asked=["a", HOSTILE], missing={HOSTILE: f"\n# {HOSTILE}"}),
    ]
    folder = ended(run_folder(tmp_path, "a <b>run", lines), "failed", error=f"no\n# {HOSTILE}")
    (path,) = write_report([str(folder)], tmp_path / "all", [form])
    text = path.read_text(encoding="utf-8")
    assert "<script>alert" not in text
    assert "<b>run" not in text.replace(str(folder / "config.yaml"), "")
    assert "&lt;script&gt;alert" in text
    assert form == "html" or "\n# " not in text
    if form == "html":
        assert "\\u003cscript\\u003ealert" in text, "in the figures' data"


def test_no_spreadsheet_computes_what_strangers_say(tmp_path: Path) -> None:
    names = ['=HYPERLINK("http://x")', "+1", "-1", "@x", "\tx", "a=b"]
    lines = [step(1, 1, 1, name, loss=-1.0) for name in names]
    lines.append(round_(1, 2, 3.0, asked=names, clients=names[1:], missing={names[0]: "=1+1"}))
    folder = run_folder(tmp_path, "=run", lines)
    _, clients = write_report([str(folder)], tmp_path / "all", ["csv"])
    rows = list(csv.DictReader(clients.open(newline="")))
    told = {row["client"] for row in rows}
    assert told == {*(f"'{name}" for name in names[:-1]), "a=b"}
    assert {row["run"] for row in rows} == {"'=run"}
    assert [row["why"] for row in rows if row["why"]] == ["'=1+1"]
    assert {row["train_loss"] for row in rows} == {"-1.0"}, "a number stays one"


def test_clients_with_names_that_begin_alike_have_places_of_their_own(tmp_path: Path) -> None:
    names = ["x" * 80 + end for end in ("a", "b", "y" + "x" * 20, "z" + "x" * 20)]
    lines = [*(step(1, 1, 1, name) for name in names), round_(1, 2, 3.0, asked=names)]
    text = page(run_folder(tmp_path, "one", lines), out=tmp_path)
    (data,) = re.findall(r'(?s)<script[^>]*id="data"[^>]*>(.*?)</script>', text)
    (run,) = json.loads(data)["runs"]
    places = run["participation"]["rows"]
    assert places == run["clients"]["place"]
    assert places[0] == "x" * 20 + "…" + "x" * 10 + "a"
    assert len(set(places)) == 4
    assert max(map(len, places)) < 40


def test_runs_of_every_fate_are_reported(tmp_path: Path) -> None:
    start, asked = line("start", 0, 0), line("asked", 1, 1, attempt=1, training=True, clients=["a"])
    empty = run_folder(tmp_path, "empty", [])
    begun = run_folder(tmp_path, "begun", [start, asked, step(1, 1, 2, loss=math.nan)])
    tried = [start, asked, step(1, 1, 2), line("answered", 1, 3, attempt=1, training=True,
             client="a", why="gone")]  # fmt: skip
    failed = ended(run_folder(tmp_path, "failed", tried), "failed", error="no quorum")
    lacking = [f'{{"kind": "{kind}", "round": 1}}' for kind in ("step", "asked", "answered")]
    damaged = ["garbage", "", *lacking]
    old = run_folder(tmp_path, "old", [round_(0, None, 5.0), step(1, 1, None), *damaged])
    (old / "config.yaml").unlink()

    text = page(empty, begun, failed, old, out=tmp_path)
    told = {run["name"]: run for run in numbers(empty, begun, failed, old, out=tmp_path)["runs"]}

    assert "The run failed: no quorum" in text
    assert "4 lines of metrics.jsonl are no records" in text
    assert "An earlier Graft wrote this record" in text
    assert [told[name]["status"] for name in told] == [*["unfinished"] * 2, "failed", "unfinished"]
    assert told["begun"]["participation"][0]["outcomes"] == {"a": "waiting"}
    assert told["failed"]["participation"][0]["undone"]
    assert [(c["steps"], c["tokens"]) for c in told["failed"]["clients"]] == [(1, 0)]
    assert told["old"]["steps"]["at"] == [11]
    for name in told:
        write_report([str(tmp_path / name)], tmp_path / "one", ["html", "md", "csv"])


def test_csv_has_a_row_for_each_run_round_and_client(tmp_path: Path) -> None:
    folders = [str(small(tmp_path, f"run-{seed}", seed)) for seed in (0, 1)]
    rounds, clients = write_report(folders, tmp_path / "all.html", ["csv"])
    assert (rounds.name, clients.name) == ("all.rounds.csv", "all.clients.csv")
    rows = list(csv.DictReader(rounds.open()))
    assert [(r["run"], r["seed"], r["round"], r["heldout_loss"]) for r in rows[1:3]] == [
        ("run-0", "0", "1", "3.0"),
        ("run-1", "1", "0", "5.0"),
    ]
    assert [(r["run"], r["client"], r["tokens"]) for r in csv.DictReader(clients.open())] == [
        ("run-0", "a", "20"),
        ("run-0", "b", "20"),
        ("run-1", "a", "20"),
        ("run-1", "b", "20"),
    ]


def test_a_long_run_makes_a_page_that_can_be_opened(tmp_path: Path) -> None:
    lines = [
        step(number, place, number + place / 100, f"client-{who}", steps=20)
        for number in range(1, 6)
        for place in range(1, 21)
        for who in range(100)
    ]
    (path,) = write_report([str(run_folder(tmp_path, "long", lines))], tmp_path / "a", ["html"])
    text = path.read_text(encoding="utf-8")
    assert len(text) < 8e6
    assert "They are thinned" not in text, "a hundred steps a client are drawn as they are"
    more = [step(1, place, place, steps=5000) for place in range(1, 5001)]
    text = page(run_folder(tmp_path, "longer", more), out=tmp_path)
    assert "a point is the mean over 5 and 5 steps; JSON has every step" in text


def test_a_sweep_is_reported_as_its_runs(tmp_path: Path) -> None:
    folders = [small(tmp_path, f"run-{seed}", seed) for seed in (0, 1)]
    points = [
        Point(id=f"p{i}", values={}, seed=i, clients=2, overrides=[], run=str(folder))
        for i, folder in enumerate([*folders, "", ""])
    ]
    points[2].status, points[2].error = "crashed", HOSTILE
    sweep = tmp_path / "sweep"
    sweep.mkdir()
    write_sweep(sweep, Sweep(name="mine", experiment="demo", keys=[], points=points))

    result = CliRunner().invoke(app, ["report", str(sweep), "--format", "html,json"])

    assert result.exit_code == 0, result.output
    assert result.output.split() == [str(sweep / "report.html"), str(sweep / "report.json")]
    told = json.loads((sweep / "report.json").read_text())
    assert [run["name"] for run in told["runs"]] == ["run-0", "run-1"]
    assert told["notes"] == [
        f"p2 (seed=2) crashed: {HOSTILE}",
        "3 of 4 points are still to be run, or run now.",
    ]
    text = (sweep / "report.html").read_text()
    assert "<h1>Sweep mine</h1>" in text
    assert "p2 (seed=2) crashed: &lt;script&gt;" in text


def test_what_cannot_be_reported_is_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--format pdf: a report can be html, md, json, csv"):
        write_report([str(small(tmp_path))], None, ["pdf"])
    with pytest.raises(ValueError, match="is no run"):
        write_report(["nowhere"], None, ["html"])
    with pytest.raises(ValueError, match="is no run folder"):
        write_report([str(tmp_path)], None, ["html"])


def test_configuration_tells_first_what_is_not_as_by_default(tmp_path: Path) -> None:
    train = replace(TrainConfig(), lr=0.5)
    (run,) = numbers(run_folder(tmp_path, "one", [], train=train), out=tmp_path)["runs"]
    assert run["changed"] == [["train.lr", 0.5, TrainConfig().lr]]


def test_codecs_are_told_in_words_and_by_todays_name(tmp_path: Path) -> None:
    new = run_folder(tmp_path, "new", [], link=LinkConfig(codec="h1=int4 h2=int6"))
    old = run_folder(tmp_path, "old", [])
    config = yaml.safe_load((old / "config.yaml").read_text())
    del config["link"]["codec"]
    config["link"]["dtype"] = "bf16"
    (old / "config.yaml").write_text(yaml.safe_dump(config))

    (path,) = write_report([str(old), str(new)], tmp_path / "all", ["md"])

    text = path.read_text(encoding="utf-8").replace("\\_", "_")
    assert "link.codec | h1=int4 h2=int6 grad_h2=fp32 grad_h1=fp32 | fp32" in text
    assert "link.codec | bf16 | fp32" in text
    assert "link.dtype" not in text


def test_a_report_says_what_leaks_or_that_nobody_looked(tmp_path: Path) -> None:
    run = small(tmp_path)
    assert "This run was not audited" in page(run, out=tmp_path)
    told = {
        "rows": [
            {
                "attack": "search", "who": "client", "reads": "h1", "knowledge": "exact",
                "metric": "tokens", "main": True, "held": False, "mean": 0.987, "low": 0.9,
                "high": 1.0, "chance": 0.125, "count": 77,
            }
        ],
        "trained": True, "seeds": [0, 1], "scope": {"clients": 2},
        "calibration": {"search": {"found": 1.0, "must_find": 0.99, "shuffled": 0.1,
                                   "must_not_pass": 0.2}},
        "refused": {"rows": "no verdict: it is <b>bold</b>"},
    }  # fmt: skip
    (run / "leakage.json").write_text(json.dumps(told), encoding="utf-8")
    (path,) = write_report([str(run)], tmp_path / "all", ["md"])
    for text in (page(run, out=tmp_path), path.read_text(encoding="utf-8")):
        assert "not audited" not in text
        assert all(
            each in text for each in ("search", "client", "the ends of the step", "0.987", "0.125")
        )
        assert "run's client does not see" in text.replace("&#x27;", "'").replace("&#39;", "'")
        assert "no verdict" in text
        assert "<b>bold" not in text
    assert numbers(run, out=tmp_path)["runs"][0]["leakage"] == told
