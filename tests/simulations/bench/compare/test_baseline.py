"""`graft bench compare`: all methods train on the same, and what is counted is what there is."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model_state_dict
from safetensors.torch import load_file

from conf.schema import Config
from flower_app.build import build_client
from flower_app.client import streamed
from flower_app.client.place import Place
from simulations.bench.compare import report, rows
from simulations.bench.compare.compare import leave
from simulations.bench.compare.counted import count_quickly, count_round
from simulations.bench.compare.data import all_heldout, client_steps
from simulations.bench.compare.fedavg.app import load_model, mean_loss
from simulations.bench.compare.flops import count_flops, full_batch
from simulations.bench.compare.memory import Echo
from simulations.bench.compare.methods import graft_rounds, train_central
from simulations.bench.compare.publish import FIGURE, PAGE, README, publish
from simulations.bench.compare.settings import (
    FEDAVG,
    METHODS,
    QUICK,
    Compare,
    Start,
    config_of,
)
from simulations.bench.compare.start import make_start
from simulations.bench.compare.weak import Point, Slow, SlowTrainer, predicted_split
from simulations.equality.federation import largest_difference
from simulations.equality.reference import fed_avg_round

TINY = Compare(
    rounds=2, local_steps=2, batch_size=2, context=32, hidden=32, blocks=4, rank=4,
    max_examples=20, base_steps=2,
)  # fmt: skip
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Start:
    return make_start(TINY, tmp_path_factory.mktemp("start"))


@pytest.fixture(scope="module")
def trained(start: Start, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trained]:
    """Both rounds of each federated method that is to equal another, in this process."""
    found = {}
    for method in (FEDAVG, "splitfed-v1", "merged"):
        folder = tmp_path_factory.mktemp(method)
        config = config_of(TINY, start, method, folder)
        found[method] = Trained(config, folder, count_round(config, method, folder))
    return found


class Trained:
    """A method's run."""

    def __init__(self, config: Config, folder: Path, counted: dict[str, float]) -> None:
        self.config, self.counted = config, counted
        self.adapter = next(folder.glob("**/adapter_model.safetensors")).parent

    @property
    def records(self) -> list[dict[str, Any]]:
        text = (self.adapter.parent / "metrics.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]

    def heldout(self) -> float:
        return mean_loss(load_model(self.config, str(self.adapter)), all_heldout(self.config))[0]


def test_the_fedavg_app_averages_as_by_hand(start: Start, tmp_path: Path) -> None:
    config = _unequal(config_of(TINY, start, FEDAVG, tmp_path), tmp_path)
    count_round(config, FEDAVG, tmp_path)
    model = load_model(config)
    first = {name: value.clone() for name, value in get_peft_model_state_dict(model).items()}

    for number in (1, 2):
        cohort = [client_steps(config, client, number) for client in range(TINY.clients)]
        assert len(cohort[0]) != len(cohort[1]), "equal weights say nothing"
        fed_avg_round(model, cohort, config.train, number, TINY.rounds)

    by_hand = get_peft_model_state_dict(model)
    found = load_file(tmp_path / "model" / "adapter_model.safetensors")
    assert largest_difference(by_hand, found) < 1e-5
    assert largest_difference(by_hand, first) > 1e-3, "nothing was learned: nothing is compared"


def _unequal(config: Config, folder: Path) -> Config:
    """One client has one document, the other two; each trains for an epoch a round."""
    lines = Path(config.data.path).read_text(encoding="utf-8").splitlines()[:3]
    few = folder / "few.jsonl"
    short = [{"text": json.loads(line)["text"][:700]} for line in lines]
    few.write_text("\n".join(map(json.dumps, short)), encoding="utf-8")
    data = replace(config.data, path=str(few), partitioner="linear", max_examples=0)
    train = replace(config.train, local_steps=0, local_epochs=1, batch_size=8)
    return replace(config, data=data, train=train)


def test_splitfed_v1_ends_where_fedavg_of_the_unsplit_model_does(
    trained: dict[str, Trained],
) -> None:
    split, whole = trained["splitfed-v1"], trained[FEDAVG]

    tensors = [load_file(each.adapter / "adapter_model.safetensors") for each in (split, whole)]

    assert largest_difference(*tensors) < 1e-4
    assert split.heldout() == pytest.approx(whole.heldout(), abs=1e-5)


def test_merged_takes_the_steps_of_central_training(
    trained: dict[str, Trained], start: Start, tmp_path: Path
) -> None:
    central = train_central(config_of(TINY, start, "central", tmp_path), tmp_path, threads=1)
    steps = [each for each in trained["merged"].records if each["kind"] == "step"]

    for row in central["rounds"][1:]:
        own = [each for each in steps if each["round"] == row["round"]]
        for number, loss in enumerate(row["losses"], start=1):
            of_step = [each for each in own if each["step"] == number]
            tokens = sum(each["tokens"] for each in of_step)
            mean = sum(each["loss"] * each["tokens"] for each in of_step) / tokens
            assert mean == pytest.approx(loss, abs=1e-5)
    assert trained["merged"].heldout() == pytest.approx(central["rounds"][-1]["heldout"], abs=1e-5)


def test_bytes_of_the_stream_are_those_of_its_frames(trained: dict[str, Trained]) -> None:
    found = graft_rounds(trained["splitfed-v1"].records, TINY.clients)[1]
    crossing = 4 * TINY.batch_size * TINY.context * TINY.hidden
    steps = TINY.clients * TINY.local_steps

    for way in ("bytes_up", "bytes_down"):  # two tensors, and the words of at most four frames
        assert 2 * crossing < found[way] / steps < 2 * crossing + 1000


def test_flowers_messages_hold_the_adapters(trained: dict[str, Trained]) -> None:
    whole = trained[FEDAVG].counted
    split = trained["splitfed-v1"].counted
    tensors = load_file(trained[FEDAVG].adapter / "adapter_model.safetensors")
    of_ends = [t for name, t in tensors.items() if ".0." in name or ".3." in name]
    all_bytes = sum(t.nbytes for t in tensors.values())
    end_bytes = sum(t.nbytes for t in of_ends)

    for way in ("flower_up", "flower_down"):
        assert all_bytes < whole[way] < 2.5 * all_bytes  # names and headers: tensors are tiny
        assert end_bytes < split[way] < whole[way]


def test_a_step_over_the_stream_adds_nothing_to_flowers_messages(
    trained: dict[str, Trained], tmp_path: Path
) -> None:
    whole = trained["splitfed-v1"]

    quick = count_quickly(whole.config, "splitfed-v1", tmp_path)

    for way in ("flower_up", "flower_down"):
        assert quick[way] == pytest.approx(whole.counted[way], rel=0.01)


def test_operations_of_the_parts_are_those_of_the_whole(start: Start, tmp_path: Path) -> None:
    found = count_flops(config_of(TINY, start, "splitfed-v1", tmp_path))

    assert found["whole"] == found["bottom"] + found["trunk"] + found["top"]
    assert found["trunk"] == 2 * _operations_of_a_block()
    assert 0 < found["again"] < found["bottom"] / 2


def _operations_of_a_block() -> int:
    """Forward and backward to its input, by hand: frozen weights, LoRA on each, attention."""
    tokens, width, wide = TINY.batch_size * TINY.context, TINY.hidden, 2 * TINY.hidden
    linears = 4 * [(width, width)] + 2 * [(width, wide)] + [(wide, width)]
    frozen = sum(2 * 2 * n * m for n, m in linears)  # forward, and back to the input
    lora = sum(3 * 2 * TINY.rank * (n + m) for n, m in linears)  # and to the weights
    attention = (2 + 5) * 2 * TINY.context * width  # two products, and five to go back
    return tokens * (frozen + lora + attention)


def test_a_slow_client_waits_as_often_as_it_is_slower() -> None:
    slow, began = Slow(4.0), time.perf_counter()

    with slow():
        torch.randn(200, 200) @ torch.randn(200, 200)

    assert slow.seconds > 0
    assert time.perf_counter() - began >= 4.0 * slow.seconds * 0.99


def test_a_slow_client_takes_the_same_steps(start: Start, tmp_path: Path) -> None:
    config, slow = config_of(TINY, start, "splitfed-v1", tmp_path), Slow(2.0)
    place = Place(seed=0, client="client-0", round=1, rounds=1)
    losses = []

    for trainer in (SlowTrainer, streamed.Trainer):
        own = (slow,) if trainer is SlowTrainer else ()
        each = trainer(*own, *build_client(config), Echo(), 2, config.train, place)
        losses.append([each.step(step, [full_batch(config)]) for step in range(2)])

    assert losses[0] == losses[1]
    assert losses[0][0] != losses[0][1], "nothing was learned"
    assert slow.seconds > 0


def test_at_break_even_a_split_step_takes_as_long_as_an_unsplit_one() -> None:
    one = Point(step=0.5, client=0.1, trunk=0.2, bytes_up=1e6, bytes_down=1e6)
    parts = {"whole": 0.3, "overhead": 0.05, **vars(one)}

    k = rows.break_even(parts, 100)

    assert k is not None
    split = predicted_split(one, slow=k, megabits=100, clients=2, cores=2, overhead=0.05)
    assert split == pytest.approx(k * parts["whole"])
    full = predicted_split(one, slow=1, megabits=1e6, clients=8, cores=2, overhead=0.0)
    assert full == pytest.approx(8 * 0.2 / 2), "eight clients wait for two cores"
    assert rows.break_even({**parts, "whole": 0.1}, 100) is None


def test_a_target_is_one_that_all_methods_reach() -> None:
    assert rows.target_loss([2.1, 2.3001, 2.2]) == 2.301


def test_tables_and_figure_have_every_method_and_point(tmp_path: Path) -> None:
    leave(_made_up(), tmp_path)

    text = (tmp_path / "compare.md").read_text(encoding="utf-8")
    assert text.count("| seconds of a step, median |") == 1
    assert "1.50 unsplit steps" in text
    assert (tmp_path / "compare.png").stat().st_size < 200_000
    for columns, lines in report.tables(_made_up()):
        assert lines
        assert all(len(line) == len(columns) for line in lines)


def test_results_are_put_between_the_marks_of_the_docs(tmp_path: Path, project: Path) -> None:
    (tmp_path / "docs").mkdir()
    for page in (PAGE, README):
        shutil.copyfile(project / page, tmp_path / page)
    leave(_made_up(), tmp_path / "left")

    for _ in range(2):  # what was published before is replaced
        publish(tmp_path / "left", tmp_path)

    page = (tmp_path / PAGE).read_text(encoding="utf-8")
    assert page.count("| seconds of a step, median |") == 1
    assert page.startswith("# What splitting costs")
    assert page.rstrip().endswith("too thin for it.")
    assert "**1.50 unsplit steps**" in (tmp_path / README).read_text(encoding="utf-8")
    assert (tmp_path / FIGURE).exists()


def _made_up() -> dict[str, Any]:
    flops = {"whole": 100, "bottom": 20, "trunk": 60, "top": 20, "again": 10}
    memory = {"whole": {"peak_mb": 100.0}, "ends": {"peak_mb": 40.0}}
    methods = {}
    for number, method in enumerate(METHODS):
        seconds = 0.3 if method == "splitfed-v1" else 0.2
        steps = {"steps": [seconds], "seconds": 1.0, "whole": 2.0, "tokens": 50, "client": 0.5}
        told = [{"round": 0, "heldout": 3.0, "whole": 0.0}]
        told.append({"round": 1, "heldout": 2.0 + number / 100, "bytes_up": 9e4, **steps})
        run = {"rounds": told, "start_seconds": 9.0, "heldout": 2.0, "averaging": 0.1}
        methods[method] = rows.row_of(method, run, 2.05, flops, memory, 10)
    one = dict.fromkeys(("unsplit", "split", "unsplit_predicted", "split_predicted"), 1.0)
    one |= {
        "megabits": 100,
        "unsplit_with_messages": 1.2,
        "split_with_messages": 1.0,
        "most_clients": 9,
    }
    weak = {"weak": [{**one, "slow": k} for k in (1, 4)], "break_even": {"100": 1.5}}
    return {
        "setting": vars(replace(TINY)),
        "machine": {"cpus": 2, "python": "3", "torch": "2"},
        "target_loss": 2.05,
        "methods": methods,
        "differences": rows.differences(methods),
        "memory": memory,
        **weak,
        "headline": rows.headline(methods, flops, memory, weak),
        "seconds": 1.0,
    }


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_quick_comparison_end_to_end(tmp_path: Path) -> None:
    from simulations.bench.compare.compare import bench_compare

    result = bench_compare(quick=True, folder=tmp_path)

    assert tuple(result["methods"]) == QUICK.methods
    assert all(abs(gap) < 1e-4 for gap in result["differences"].values()), result["differences"]
    assert all(row["target_seconds"] for row in result["methods"].values())
    assert {path.name for path in tmp_path.iterdir()} == {
        "compare.json",
        "compare.md",
        "compare.png",
    }
