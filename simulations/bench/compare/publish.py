"""Puts what `graft bench compare --out FOLDER` left into the docs: tables, figure, first screen.

Run as ``python -m simulations.bench.compare.publish FOLDER``.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from simulations.bench.compare.report import markdown

PROJECT = Path(__file__).resolve().parents[3]
PAGE, FIGURE, README = "docs/baseline.md", "docs/baseline.png", "README.md"
MARK = "<!-- {}compare -->"


def publish(folder: Path, project: Path = PROJECT) -> None:
    """Replace what stands between the marks of the page and of README, and the figure.

    Parameters
    ----------
    folder : Path
        Where `leave` wrote to.
    project : Path
        A checkout.
    """
    result = json.loads((folder / "compare.json").read_text(encoding="utf-8"))
    _replace(project / PAGE, markdown(result))
    _replace(project / README, first_screen(result))
    shutil.copyfile(folder / "compare.png", project / FIGURE)


def first_screen(result: Mapping[str, Any]) -> str:
    """What splitting costs and brings, in a few lines of README."""
    head, own = result["headline"], result["setting"]
    slowest = max(row["slow"] for row in result["weak"])
    weak = [
        f"{row['split'] / row['unsplit']:.2f} ({row['megabits']} Mbit/s)"
        for row in result["weak"]
        if row["slow"] == slowest
    ]
    return "\n".join(
        [
            f"**What it costs:** on the same cores a split step takes "
            f"**{head['step_ratio']:.2f} unsplit steps**, and",
            f"{head['bytes_per_token'] / 1000:.1f} kB a token cross the line. **What it brings:** "
            f"a client does **{head['flops_share']:.0%} of the operations**",
            f"and holds **{head['memory_share']:.0%} of the memory**; for clients that compute "
            f"{slowest} times slower than the server a split step takes",
            f"{' or '.join(weak)} unsplit ones. (Llama of "
            f"{own['blocks']} x {own['hidden']}, cut {own['cut'][0]},{own['cut'][1]}, fp32;",
            "`graft bench compare`, [docs/baseline.md](docs/baseline.md), which also says where "
            "FedAvg is better.)",
            "",
        ]
    )


def _replace(page: Path, text: str) -> None:
    start, end = MARK.format(""), MARK.format("/")
    old = page.read_text(encoding="utf-8")
    new, count = re.subn(
        f"{re.escape(start)}.*?{re.escape(end)}", lambda _: f"{start}\n{text}{end}", old, flags=re.S
    )
    if count != 1:
        raise ValueError(f"{page} has {count} places between {start} and {end}; one is needed")
    page.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    publish(Path(sys.argv[1]))
