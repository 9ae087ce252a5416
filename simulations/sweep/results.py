"""What a sweep's runs came to: a row for each point and round, and means over seeds."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.rules import ConfigError, nearest
from flower_app.runs.history import read_history
from flower_app.runs.lines import perplexity
from simulations.sweep.state import CRASHED, FINISHED, PRUNED, Point, Sweep, counted, shown

if TYPE_CHECKING:
    from pandas import DataFrame

logger = logging.getLogger(__name__)

MEASURES = {
    "eval_loss": "held-out loss (nats per token)",
    "perplexity": "held-out perplexity",
    "train_loss": "training loss (nats per token)",
    "tokens": "tokens trained on",
    "mb_up": "MB from clients to the trunk",
    "mb_down": "MB from the trunk to clients",
    "mb": "MB both ways",
    "seconds": "seconds of the run",
    "client_peak_mb": "peak memory of a client, MB",
    "server_peak_mb": "peak memory of the server, MB",
}
"""Columns of the results, and what they are; sums are from the run's beginning."""


def check_measures(names: Sequence[str]) -> None:
    """Refuse the name of a column that results do not have, with the nearest."""
    for name in names:
        if name not in MEASURES:
            raise ConfigError(
                f"plot: there is no {name!r}{nearest(name, MEASURES)}; there are "
                f"{', '.join(MEASURES)}"
            )


def rows_of(sweep: Sweep) -> DataFrame:
    """Return a row for each point and round, round 0 being before training.

    Returns
    -------
    DataFrame
        point, status, the swept keys, seed, clients, round, the columns of `MEASURES`, run.
    """
    from pandas import DataFrame

    columns = ["point", "status", *(key for key in sweep.keys if key != "clients"), "seed"]
    columns += ["clients", "round", *MEASURES, "run"]
    rows = [row for point in sweep.points for row in _rows(point)]
    frame = DataFrame(rows, columns=columns)
    numbers = list(MEASURES)
    frame[numbers] = frame[numbers].astype("float64")
    return frame


def _rows(point: Point) -> Iterator[dict[str, Any]]:
    if not point.run:
        return
    try:
        history = read_history(Path(point.run))
    except (ValueError, OSError) as error:
        logger.warning("point %s is left out of the results: %s", point.id, error)
        return
    swept = {
        key: shown(value) if isinstance(value, list | tuple | dict) else value
        for key, value in point.values.items()
    }
    tokens = up = down = 0
    for record in history.rounds:
        tokens += record.get("tokens") or 0
        up += record.get("bytes_up") or 0
        down += record.get("bytes_down") or 0
        loss = (record.get("evaluate") or {}).get("loss")
        yield {
            "point": point.id,
            "status": point.status,
            **swept,
            "seed": point.seed,
            "clients": point.clients or len(record.get("clients") or ()),
            "round": record["round"],
            "eval_loss": loss,
            "perplexity": None if loss is None else perplexity(loss),
            "train_loss": (record.get("train") or {}).get("loss"),
            "tokens": tokens,
            "mb_up": up / 1e6,
            "mb_down": down / 1e6,
            "mb": (up + down) / 1e6,
            "seconds": record.get("at"),
            "client_peak_mb": _client_peak(record),
            "server_peak_mb": (record.get("memory") or {}).get("server_peak_mb"),
            "run": point.run,
        }


def _client_peak(record: Mapping[str, Any]) -> float | None:
    """The most that any client had, if the record tells."""
    told = [
        metrics["peak-memory-mb"]
        for client in (record.get("per_client") or {}).values()
        for metrics in client.values()
        if isinstance(metrics, Mapping) and "peak-memory-mb" in metrics
    ]
    return max(told, default=None)


def last_rows(rows: DataFrame) -> DataFrame:
    """Return the last round of each finished point, with the peak of all its rounds."""
    finished = rows[rows["status"] == FINISHED]
    last = finished.sort_values("round").groupby("point", as_index=False, sort=True).tail(1)
    last = last.set_index("point").sort_index()
    for name in ("client_peak_mb", "server_peak_mb"):
        last[name] = finished.groupby("point")[name].max()
    return last.reset_index()


def over_seeds(last: DataFrame, keys: Sequence[str]) -> DataFrame:
    """Return mean, standard deviation (of a sample) and number of each measure, by setting.

    Parameters
    ----------
    last : DataFrame
        As `last_rows` returns it.
    keys : sequence of str
        What is swept.

    Returns
    -------
    DataFrame
        The keys, `n`, and for each measure NAME and NAME_std, which is missing where n is 1;
        settings are in the order in which they first come.
    """
    frame = last.assign(_all="") if not keys else last
    by = list(keys) or ["_all"]
    groups = frame.groupby(by, sort=False, dropna=False)
    result = groups[list(MEASURES)].mean()
    deviation = groups[list(MEASURES)].std()
    for name in MEASURES:
        result[f"{name}_std"] = deviation[name]
    result.insert(0, "n", groups.size())
    return result.reset_index().drop(columns="_all", errors="ignore")


def table(sweep: Sweep, rows: DataFrame) -> str:
    """Return means and spreads over seeds as Markdown, the best in bold, and what went wrong."""
    means = _in_order(over_seeds(last_rows(rows), sweep.keys), sweep)
    told = [name for name in _COLUMNS if means[name].notna().any()]
    best = means["eval_loss"].idxmin() if means["eval_loss"].notna().any() else None
    lines = [
        f"# {sweep.name}",
        "",
        f"Experiment `{sweep.experiment}`: {sweep.count(FINISHED)} of {len(sweep.points)} points "
        "finished. After the last round, mean ± standard deviation over seeds (n of them).",
        "",
        _row([*sweep.keys, "n", *(_COLUMNS[name][0] for name in told)]),
        _row(["---"] * (len(sweep.keys) + 1 + len(told))),
    ]
    for index, row in enumerate(means.to_dict("records")):
        cells = [shown(row[key]) for key in sweep.keys] + [str(row["n"])]
        cells += [_spread(row[name], row[f"{name}_std"], _COLUMNS[name][1]) for name in told]
        lines.append(_row([f"**{cell}**" if index == best else cell for cell in cells]))
    lines += [line for part in (_crashed(sweep), _pruned(sweep)) for line in part]
    return "\n".join(lines) + "\n"


def _in_order(means: DataFrame, sweep: Sweep) -> DataFrame:
    """Settings in the order of the sweep's points, also where the first point of one crashed."""
    first: dict[tuple[str, ...], int] = {}
    for place, point in enumerate(sweep.points):
        first.setdefault(_setting(point.values, sweep.keys), place)
    places = [first.get(_setting(row, sweep.keys), 0) for row in means.to_dict("records")]
    order = sorted(range(len(places)), key=places.__getitem__)
    return means.iloc[order].reset_index(drop=True)


def _setting(values: Mapping[str, Any], keys: Sequence[str]) -> tuple[str, ...]:
    return tuple(shown(values.get(key)) for key in keys)


_COLUMNS = {
    "eval_loss": ("held-out loss", ".4f"),
    "perplexity": ("perplexity", ".2f"),
    "mb_up": ("MB up", ".1f"),
    "mb_down": ("MB down", ".1f"),
    "tokens": ("tokens", ",.0f"),
    "seconds": ("seconds", ".0f"),
    "client_peak_mb": ("client peak MB", ".0f"),
    "server_peak_mb": ("server peak MB", ".0f"),
}
"""Of the table: headings, and how their numbers are written."""


def _spread(mean: float, deviation: float, form: str) -> str:
    if mean != mean:
        return "-"
    spread = format(deviation, form) if deviation == deviation else "0"
    plain = float(spread.replace(",", "")) == 0
    return format(mean, form) if plain else f"{format(mean, form)} ± {spread}"


def _crashed(sweep: Sweep) -> list[str]:
    points = [point for point in sweep.points if point.status == CRASHED]
    if not points:
        return []
    words = "`graft sweep --resume FOLDER --retry-failed` runs them again."
    lines = ["", f"Crashed, and not in the table; {words}", ""]
    return lines + [f"- {point.id} {point.name}: {point.error} (logs/{point.id}.log)"
                    for point in points]  # fmt: skip


def _pruned(sweep: Sweep) -> list[str]:
    count = sweep.count(PRUNED)
    if not count:
        return []
    return ["", f"Not in the table, for they were hopeless: {counted(count, 'point')} ended early."]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
