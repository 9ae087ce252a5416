"""Is federated split training exactly what it is said to be? Every claim, against plain PyTorch.

``graft parity --all`` prints what `run_equivalence` finds; docs/exactness.md explains each claim.
"""

from __future__ import annotations

import io
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from models.source import find_model
from simulations.equality.claims import CLAIMS
from simulations.equality.subjects import Subject, checkpoint, tiny
from simulations.equality.trial import Claim, NotTriedError

TELLING = 20
"""A difference says something if training moved the weights by so many tolerances, at least."""

SMALLER = {"all": "LoRA", "trunk": "trunk LoRA"}
"""What a large model trains instead."""

LARGE_EPS = 1e-5
"""AdamW's eps for a large model. With 1e-8 it magnifies rounding there until the unsplit model
differs by 1e-3 from itself with the last bit of its adapters disturbed."""

OPTIMIZERS = {"sgd": "SGD", "adamw": "AdamW"}


@dataclass(frozen=True)
class ClaimRow:
    """What came of a claim on a model."""

    claim: str
    trains: str
    """What is trained, and how: all, SGD."""
    model: str
    tolerance: float
    difference: float | None = None
    moved: float | None = None
    why: str = ""
    """Why it was not tried, or what went wrong."""
    failed: bool = False
    """Whether an error ended it."""
    seconds: float = 0.0

    @property
    def verdict(self) -> str:
        """In words: equal, NOT EQUAL, FAILED, SAYS NOTHING or not tried."""
        if self.failed:
            return "FAILED"
        if self.difference is None:
            return "not tried"
        if not self.difference <= self.tolerance:
            return "NOT EQUAL"
        if self.moved is not None and not self.moved >= TELLING * self.tolerance:
            return "SAYS NOTHING"
        return "equal"

    @property
    def ok(self) -> bool:
        """Whether the claim stands, as far as it was tried."""
        return self.verdict in ("equal", "not tried")


@dataclass
class EquivalenceReport:
    """All rows."""

    rows: list[ClaimRow] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether something was tried and no claim failed."""
        return all(row.ok for row in self.rows) and any(r.verdict == "equal" for r in self.rows)

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain values."""
        return {
            "ok": self.ok,
            "rows": [{**asdict(row), "verdict": row.verdict} for row in self.rows],
        }


def run_equivalence(
    model: str = "",
    *,
    attention: str = "both",
    allow_untested: bool = False,
    claims: Sequence[Claim] | None = None,
    families: Sequence[str] = ("llama", "gpt2"),
    say: Callable[[str], None] = lambda line: None,
) -> EquivalenceReport:
    """Try every claim on a checkpoint, or on tiny random models; in fp32, on one thread.

    Parameters
    ----------
    model : str
        Folder, hub id or ``.gguf`` file; empty: a tiny model of each of `families`.
    attention : str
        sdpa or eager; both: sdpa where the family has it.
    allow_untested : bool
        Try a family outside the tested table.
    claims : sequence of Claim, optional
        By default `CLAIMS`.
    families : sequence of str
        Of the tiny models.
    say : callable
        Hears of each claim.
    """
    report = EquivalenceReport()
    with tempfile.TemporaryDirectory(prefix="graft-parity-") as scratch, _one_thread():
        if model:
            model = find_model(model, key="--model")
            subjects = [checkpoint(model, attention, allow_untested, Path(scratch))]
        else:
            subjects = [tiny(family, attention, Path(scratch)) for family in families]
        for claim in CLAIMS if claims is None else claims:
            for subject in subjects:
                own = _for_large(claim) if subject.large else claim
                tried = {(row.claim, row.trains, row.model) for row in report.rows}
                if (own.text, _trains(own), subject.name) not in tried:
                    say(f"{own.text} ({_trains(own) or 'no training'}), {subject.name} ...")
                    report.rows.append(_try(own, subject))
    return report


def _try(claim: Claim, subject: Subject) -> ClaimRow:
    row = ClaimRow(claim.text, _trains(claim), subject.name, claim.tolerance)
    started = time.perf_counter()
    try:
        gap = claim.measure(subject, claim)
        row = replace(row, difference=gap.difference, moved=gap.moved)
    except NotTriedError as error:
        row = replace(row, why=str(error))
    except (ArithmeticError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
        row = replace(row, why=f"{type(error).__name__}: {error}", failed=True)
    return replace(row, seconds=round(time.perf_counter() - started, 2))


def _for_large(claim: Claim) -> Claim:
    train = {**claim.train, "eps": LARGE_EPS} if claim.optimizer == "adamw" else claim.train
    return replace(claim, trains=SMALLER.get(claim.trains, claim.trains), train=train)


def _trains(claim: Claim) -> str:
    eps = f", eps {claim.train['eps']:.0e}" if "eps" in claim.train else ""
    return f"{claim.trains}, {OPTIMIZERS[claim.optimizer]}{eps}" if claim.trains else ""


def render(report: EquivalenceReport) -> str:
    """Return the table, why rows are not equal, and the verdict."""
    table = Table(title="What is exactly equal to what: the largest absolute differences")
    for name in ("claim", "trains", "model"):
        table.add_column(name, overflow="fold")
    for name in ("difference", "moved by", "tolerance"):
        table.add_column(name, justify="right")
    table.add_column("verdict")
    for row in report.rows:
        figures = [f"{v:.1e}" if v is not None else "-" for v in (row.difference, row.moved)]
        table.add_row(
            row.claim, row.trains, row.model, *figures, f"{row.tolerance:.0e}", row.verdict
        )
    stream = io.StringIO()
    console = Console(file=stream, width=132)
    console.print(table)
    for row in report.rows:
        if row.why:
            console.print(f"{row.verdict}: {row.claim}, {row.model}: {row.why}", markup=False)
    console.print(_verdict(report))
    return stream.getvalue()


def _verdict(report: EquivalenceReport) -> str:
    wrong = sum(not row.ok for row in report.rows)
    tried = sum(row.verdict != "not tried" for row in report.rows)
    seconds = sum(row.seconds for row in report.rows)
    words = f"{wrong} NOT EQUAL" if wrong else "all equal" if tried else "nothing tried"
    return f"{tried} of {len(report.rows)} rows tried in {seconds:.0f} s: {words}"


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums in one order, whatever the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
