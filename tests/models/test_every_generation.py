"""Every family of the tested table generates with its trunk elsewhere, or is refused in words.

``GRAFT_FAMILIES=mamba,bloom`` tries only some. Writes its column of the table in docs/families.md.
"""

from __future__ import annotations

import os
import re
import warnings
from pathlib import Path

import pytest
import torch

from models import tested_families
from models.families import NAMED
from tests.models.generating import generates
from tests.models.test_every_family import build


def verdict(family: str) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return generates(build(family, "eager"))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("family", NAMED)
def test_the_named_families_generate(family: str) -> None:
    assert verdict(family) == "yes, together"


@pytest.mark.usefixtures("one_thread")
def test_a_wrong_trunk_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison must not pass whatever comes back."""
    from strategies.generation.local import LocalSession

    right = LocalSession.forward

    def wrong(self: LocalSession, h_BTD: torch.Tensor, **how: object) -> object:
        crossed = right(self, h_BTD, **how)  # type: ignore[arg-type]
        return crossed._replace(h_BTD=h_BTD)

    monkeypatch.setattr(LocalSession, "forward", wrong)
    assert verdict("llama").startswith("WRONG")


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.usefixtures("one_thread")
def test_every_tested_family_generates(project: Path) -> None:
    only = [name for name in os.environ.get("GRAFT_FAMILIES", "").split(",") if name]
    found = {}
    for family in only or tested_families():
        found[family] = verdict(family)
        print(family, found[family], sep=" | ", flush=True)
    if not only:
        write_column(found, project / "docs" / "families.md")
    assert not {name: told for name, told in found.items() if told.startswith("WRONG")}
    assert only or sum(told.startswith("yes") for told in found.values()) > 0.9 * len(found)


def write_column(found: dict[str, str], path: Path) -> None:
    """Put what was found into the table's column `generate`."""
    lines = path.read_text(encoding="utf-8").split("\n")
    for at, line in enumerate(lines):
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) == 7 and cells[0] in found:
            cells[5] = re.sub(r"\s+", " ", found[cells[0]])
            lines[at] = f"| {' | '.join(cells)} |"
    path.write_text("\n".join(lines), encoding="utf-8")
