"""A whole plan: what it counts, which cut it finds, and what it says on the terminal."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from conf.schema import Config
from models import build_scratch
from models.cut import Cut
from simulations.cli.app import app
from simulations.plan.cuts import Budgets, Memory, best_cut
from simulations.plan.families import family_config
from simulations.plan.footprint import client_footprint, server_footprint, whole_footprint
from simulations.plan.hollow import read_shape
from simulations.plan.operations import Operations
from simulations.plan.words import show

SIZES = ["train.batch_size=2", "data.context=32"]


@pytest.fixture
def llama() -> Config:
    return family_config("llama", 64, 4, [*SIZES, "train.optimizer=sgd"])


def test_operations_are_those_that_torch_counts() -> None:
    config = family_config("llama", 64, 2, ["model.attention=eager"])
    model = build_scratch(config.model.scratch, 0, attention="eager")
    ids_BT = torch.zeros(2, 16, dtype=torch.long)
    counts = []
    for counter in (FlopCounterMode(display=False), Operations()):
        with counter:
            model(input_ids=ids_BT, use_cache=False).logits.sum().backward()
        counts.append(counter)
    assert counts[1].flops == counts[0].get_total_flops() > 0


def test_both_sides_compute_what_the_unsplit_model_does(llama: Config) -> None:
    shape = read_shape(llama)
    sides = (client_footprint(shape, llama), server_footprint(shape, llama))
    whole = whole_footprint(shape, llama)
    assert sum(sum(side.flops.values()) for side in sides) == sum(whole.flops.values()) > 0
    assert sum(side.parameters for side in sides) == whole.parameters


@pytest.mark.slow
def test_many_blocks_are_foretold_from_three(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("simulations.plan.cuts.MANY", 3)
    config = family_config("llama", 32, 6, ["train.batch_size=1", "data.context=16"])
    shape = read_shape(config)
    memory = Memory(shape, config, 6, 1)
    assert memory.server(Cut(1, 1)) == server_footprint(shape, config)
    assert memory.whole() == whole_footprint(shape, config)
    client, server = memory.estimate(Cut(1, 1))
    assert (client, server) == (client_footprint(shape, config).peak, memory.server_peak(Cut(1, 1)))


class _Memory:
    """A client holds 10 for each block, the server 2."""

    def estimate(self, cut: Cut) -> tuple[float, float]:
        return 10.0 * (cut.bottom + cut.top), 2.0 * (6 - cut.bottom - cut.top)


@pytest.mark.parametrize(
    ("client", "server", "best"),
    [(0, 0, Cut(1, 1)), (0, 7, Cut(2, 1)), (29, 7, None), (30, 6, Cut(2, 1)), (20, 0, Cut(1, 1))],
)
def test_the_best_cut_keeps_to_the_budgets(client: int, server: int, best: Cut | None) -> None:
    budgets = Budgets(client=client, server=server)
    found = best_cut(6, _Memory(), budgets, lambda cut: 1.0 + cut.bottom + cut.top)  # type: ignore[arg-type]
    assert found == best


def test_a_step_that_is_hardly_faster_is_not_worth_a_clients_memory() -> None:
    seconds = {2: 1.0, 3: 0.98, 4: 0.9, 5: 0.89}
    found = best_cut(6, _Memory(), Budgets(), lambda cut: seconds[cut.bottom + cut.top])  # type: ignore[arg-type]
    assert found == Cut(3, 1)


def test_a_config_is_enough(tmp_path: Path, llama: Config) -> None:
    read_shape(llama).save_pretrained(tmp_path)
    keys = ["train.optimizer=sgd", "link.transport=messages"]
    options = ["--cut", "2,1", "--batch", "4x64", "--full", "--wire", "bf16", "--json"]
    options += ["--client-flops", "1T", "--server-flops", "10T", "--clients", "3", *keys]

    done = CliRunner().invoke(app, ["plan", str(tmp_path), *options])

    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert [each.name for each in tmp_path.iterdir()] == ["config.json"]
    assert (found["model"]["cut"], found["model"]["batch"]) == ("2,1", [4, 64])
    assert found["wire"]["up"] == pytest.approx(2 * 4 * 64 * 64 * 2, rel=0.02)
    assert found["parts"]["bottom"]["blocks"] == 2
    assert found["client"]["trainable"] == found["client"]["parameters"]
    rows = {row["cut"]: row for row in found["alternatives"]}
    assert rows["1,1"]["client_peak"] < rows["2,1"]["client_peak"] == found["client"]["peak"]
    assert rows["1,1"]["server_peak"] > rows["2,1"]["server_peak"] == found["server"]["all"]
    _check_words(found)


def _check_words(plan: dict[str, Any]) -> None:
    out = io.StringIO()
    show(plan, Console(file=out, width=80))
    text = " ".join(out.getvalue().split())
    assert "best cut: 1,1" in text
    assert "unsplit FedAvg would be" in text
    assert "the client sustains 1 TFLOP/s" in text
    assert "link.transport=messages adds to a step is not planned" in text
    assert max(map(len, out.getvalue().splitlines())) <= 80


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["demo", "--cut", "4,3"], "leaves no trunk"),
        (["demo", "--bandwidth", "100"], "100Mbit"),
        (["demo", "--lora", "4", "--full"], "exclude each other"),
        (["demmo"], "did you mean 'demo'"),
        (["demo", "--wire", "fp31"], "link.codec"),
        (["/no/such/model"], "/no/such/model"),
        (["demo", "train.strategy=merged", "train.sync=step"], "train.sync=round"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_words(arguments: list[str], words: str) -> None:
    done = CliRunner().invoke(app, ["plan", *arguments])
    assert done.exit_code == 2
    assert words in done.output
