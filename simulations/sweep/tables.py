"""Files of a sweep's folder that are made of its runs, and can be made again at any time."""

from __future__ import annotations

from pathlib import Path

from simulations.sweep.plots import draw
from simulations.sweep.results import rows_of, table
from simulations.sweep.state import Sweep


def write_tables(folder: Path, sweep: Sweep) -> list[Path]:
    """Write `results.csv`, `results.parquet`, `table.md` and the pictures; returns their paths."""
    rows = rows_of(sweep)
    csv, parquet, markdown = (
        folder / name for name in ("results.csv", "results.parquet", "table.md")
    )
    rows.to_csv(csv, index=False)
    rows.to_parquet(parquet, index=False)
    markdown.write_text(table(sweep, rows), encoding="utf-8")
    return [csv, parquet, markdown, *draw(sweep, rows, folder)]
