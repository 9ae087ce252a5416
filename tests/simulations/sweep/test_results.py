"""Tables and plots say what the runs say: means and spreads over seeds, computed here by hand."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

import pandas
import pytest

from conf.rules import ConfigError
from simulations.sweep.plots import NAMED, draw
from simulations.sweep.results import check_measures, last_rows, over_seeds, rows_of, table
from simulations.sweep.state import CRASHED, FINISHED, PENDING, Sweep
from simulations.sweep.tables import write_tables
from tests.simulations.sweep.made import make_point, make_run, make_sweep

LOSSES = {(0.001, 0): 3.0, (0.001, 1): 3.2, (0.003, 0): 2.0, (0.003, 1): 2.6}


@pytest.fixture
def sweep() -> Sweep:
    """Two settings, two seeds; one point that crashed after a round, and one to come."""
    points = []
    for number, ((rate, seed), loss) in enumerate(LOSSES.items(), start=1):
        point = make_point(number, seed, train__lr=rate)
        point.run = str(make_run([5.0, loss + 1, loss], peak=50 + 10 * seed))
        point.status = FINISHED
        points.append(point)
    crashed, coming = make_point(5, 2, train__lr=0.003), make_point(6, 3, train__lr=0.003)
    crashed.run, crashed.status, crashed.error = str(make_run([5.0, 9.0])), CRASHED, "no luck"
    return make_sweep([*points, crashed, coming])


def test_a_row_for_each_point_and_round(sweep: Sweep, tmp_path: Path) -> None:
    write_tables(tmp_path, sweep)
    rows = pandas.read_csv(tmp_path / "results.csv", dtype={"point": str})
    assert len(rows) == 4 * 3 + 2
    one = rows[(rows["point"] == "002") & (rows["round"] == 2)].iloc[0]
    assert (one["train.lr"], one["seed"], one["clients"], one["status"]) == (0.001, 1, 2, FINISHED)
    assert (one["eval_loss"], one["train_loss"]) == (3.2, 3.7)
    assert one["perplexity"] == pytest.approx(math.exp(3.2))
    assert (one["tokens"], one["mb_up"], one["mb_down"], one["mb"]) == (200, 6.0, 3.0, 9.0)
    assert (one["seconds"], one["client_peak_mb"]) == (20.0, 62.0)
    assert rows[rows["round"] == 0]["train_loss"].isna().all()
    same = pandas.read_parquet(tmp_path / "results.parquet")
    pandas.testing.assert_frame_equal(same, rows, check_dtype=False)


def test_means_and_spreads_are_over_finished_seeds(sweep: Sweep) -> None:
    rows = rows_of(sweep)
    means = over_seeds(last_rows(rows), sweep.keys)
    assert list(means["n"]) == [2, 2]
    for index, rate in enumerate((0.001, 0.003)):
        losses = [loss for (own, _), loss in LOSSES.items() if own == rate]
        assert means["eval_loss"][index] == pytest.approx(statistics.mean(losses))
        assert means["eval_loss_std"][index] == pytest.approx(statistics.stdev(losses))
    text = table(sweep, rows)
    assert "| 0.001 | 2 | 3.1000 ± 0.1414 |" in text
    assert "| **0.003** | **2** | **2.3000 ± 0.4243** |" in text
    assert "- 005 train.lr=0.003 seed=2: no luck (logs/005.log)" in text
    assert "4 of 6 points finished" in text


def test_a_setting_whose_first_point_crashed_keeps_its_place(sweep: Sweep) -> None:
    sweep.points[1].id, sweep.points[2].id = "003", "002"
    sweep.points.sort(key=lambda point: point.id)  # all of the first seed come first
    sweep.points[0].status = CRASHED
    text = table(sweep, rows_of(sweep))
    assert text.index("| 0.001 | 1 | 3.2000 |") < text.index("| **0.003** | **2** |")


def test_a_single_seed_has_no_spread(sweep: Sweep) -> None:
    sweep.points = sweep.points[:1]
    assert "| **0.001** | **1** | **3.0000** |" in table(sweep, rows_of(sweep))


def test_nothing_finished_is_a_table_without_rows(sweep: Sweep, tmp_path: Path) -> None:
    for point in sweep.points:
        point.status, point.run = PENDING, ""
    made = write_tables(tmp_path, sweep)
    assert [path.name for path in made] == ["results.csv", "results.parquet", "table.md"]
    assert "0 of 6 points finished" in (tmp_path / "table.md").read_text()


def test_a_run_folder_that_is_gone_is_left_out(sweep: Sweep) -> None:
    sweep.points[0].run = "/nowhere"
    rows = rows_of(sweep)
    assert "001" not in set(rows["point"])
    assert list(over_seeds(last_rows(rows), sweep.keys)["n"]) == [1, 2]


def test_values_that_are_lists_or_missing_survive_parquet(tmp_path: Path) -> None:
    points = [make_point(1, train__betas=[0.9, 0.99]), make_point(2, train__betas=[0.8, 0.9])]
    for point in points:
        point.run, point.status = str(make_run([5.0, 4.0])), FINISHED
    write_tables(tmp_path, make_sweep(points))
    assert set(pandas.read_parquet(tmp_path / "results.parquet")["train.betas"]) == {
        "[0.9,0.99]", "[0.8,0.9]",
    }  # fmt: skip


def test_plots_are_drawn_for_one_key_two_and_three(tmp_path: Path) -> None:
    points = []
    for number in range(24):
        rate, width, dtype = (
            (1 + number % 3) / 1000,
            number // 3 % 4,
            ["fp32", "bf16"][number // 12],
        )
        point = make_point(number + 1, train__lr=rate, cut__bottom=width, link__codec=dtype)
        loss = 3 - 100 * rate + 0.1 * width
        point.run, point.status = str(make_run([5.0, loss + 1, loss, loss - 0.2])), FINISHED
        points.append(point)
    sweep = make_sweep(points)
    assert len(points) > NAMED
    sweep.plot = ["eval_loss", "client_peak_mb"]
    made = draw(sweep, rows_of(sweep), tmp_path)
    assert [path.name for path in made] == [
        "loss.png", "heat-eval_loss.png", "heat-client_peak_mb.png",
    ]  # fmt: skip
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in made)


def test_a_key_with_one_finished_value_is_no_axis(sweep: Sweep, tmp_path: Path) -> None:
    for point in sweep.points:
        point.values["cut.bottom"] = 1 if point.status == FINISHED else 2
    sweep.keys = ["cut.bottom", "train.lr"]
    assert [path.name for path in draw(sweep, rows_of(sweep), tmp_path)] == ["loss.png"]
    for point in sweep.points:  # a third key takes its place
        point.values["link.codec"] = ["fp32", "bf16"][point.seed % 2]
    sweep.keys.append("link.codec")
    made = draw(sweep, rows_of(sweep), tmp_path)
    assert [path.name for path in made] == ["loss.png", "heat-eval_loss.png"]


def test_empty_values_and_bars_stand_in_the_table(sweep: Sweep) -> None:
    sweep.keys = ["data.path"]
    for point, path in zip(sweep.points, ["/a|b", "/a|b", "", "", "", ""], strict=True):
        point.values = {"data.path": path}
    text = table(sweep, rows_of(sweep))
    assert "| **''** | **2** |" in text
    assert r"| /a\|b | 2 |" in text
    assert sweep.points[2].name == "data.path='' seed=0"


def test_a_column_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="no 'eval_los'; did you mean 'eval_loss'"):
        check_measures(["eval_los"])


def test_a_heat_map_shows_the_mean_of_each_cell(sweep: Sweep) -> None:
    from simulations.sweep.plots import _cells

    last = last_rows(rows_of(sweep)).assign(other="x")
    cells = _cells(last, ("train.lr", "other"), [[0.001, 0.003], ["x", "y"]], "eval_loss")
    assert cells[0][0] == pytest.approx(3.1)
    assert cells[1][0] == pytest.approx(2.3)
    assert math.isnan(cells[0][1])
