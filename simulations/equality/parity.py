"""Is a split model the unsplit one? Logits and every gradient, on any model, cut and padding.

``graft parity --model PATH_OR_ID [--cut 2,1]`` prints what `run_parity` finds;
``graft parity --families`` does it for a tiny random model of every named family.
"""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import PretrainedConfig, PreTrainedModel

from models import Cut, Part, Parts, build_scratch, global_name, load_client, load_part, split
from models.families import NAMED
from models.source import find_model
from models.tiny import roughen, tiny_config
from models.verify import PADDINGS, TOLERANCE, compare, example
from models.whole import ATTENTIONS, has_sdpa, load_whole, read_config

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ParityRow:
    """The largest absolute differences of one model, attention, cut and padding."""

    model: str
    attention: str
    cut: str
    padding: str
    logits: float
    gradient: float
    parameter: str
    """Where the largest difference of gradients is."""
    loaded: str
    """Whether parts loaded one by one hold the same tensors: equal, differ, or not tried."""

    @property
    def ok(self) -> bool:
        """Whether everything is within the tolerance; NaN is not."""
        close = self.logits <= TOLERANCE and self.gradient <= TOLERANCE
        return close and not self.loaded.startswith("differ")


@dataclass
class ParityReport:
    """What was compared."""

    rows: list[ParityRow] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether something was compared and all of it is equal."""
        return bool(self.rows) and all(row.ok for row in self.rows)

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain values."""
        return {"ok": self.ok, "tolerance": TOLERANCE, "rows": [asdict(row) for row in self.rows]}


def run_parity(
    model: str,
    cuts: Sequence[Cut | tuple[int, int]] | None = None,
    attention: str = "both",
    allow_untested: bool = False,
    *,
    batch: int = 2,
    tokens: int = 16,
) -> ParityReport:
    """Compare a checkpoint, split, with itself unsplit; in fp32.

    Parameters
    ----------
    model : str
        Folder, hub id or ``.gguf`` file.
    cuts : sequence of Cut or (bottom, top), optional
        By default every cut of a model of up to 4 blocks, a few of a deeper one.
    attention : str
        sdpa, eager or both.
    allow_untested : bool
        Try a family outside the tested table.
    batch, tokens : int
        Shape of the random ids.
    """
    report, model = ParityReport(), find_model(model, key="--model")
    config = None if model.endswith(".gguf") else read_config(model)
    for how in _attentions(attention, config):
        whole = load_whole(model, attention=how).eval()
        for cut in _cuts(whole, cuts):
            parts = split(whole, cut, allow_untested=allow_untested)
            loaded = "not tried"
            if not model.endswith(".gguf"):
                loaded = _compare_loaded(model, parts, cut, how, allow_untested)
            report.rows += _rows(model, whole, parts, how, cut, batch, tokens, loaded)
    return report


def run_families(
    families: Iterable[str] = NAMED,
    *,
    attention: str = "both",
    batch: int = 2,
    tokens: int = 12,
    say: Callable[[str], None] = lambda line: None,
) -> ParityReport:
    """Compare a tiny random model of each family, at every legal cut; `say` hears of each."""
    report = ParityReport()
    for family in families:
        say(f"{family} ...")
        config = tiny_config(family)
        for how in _attentions(attention, config):
            if how == "sdpa" and not has_sdpa(config):
                say(f"{family} has no sdpa in transformers: skipped")
                continue
            whole = roughen(build_scratch(config, 0, attention=how)).eval()
            for cut in all_cuts(count_blocks(whole)):
                parts = split(whole, cut)
                report.rows += _rows(family, whole, parts, how, cut, batch, tokens, "not tried")
    return report


def parity(path_or_id: str, cut: Cut | None = None, **options: Any) -> dict[str, Any]:
    """Return `run_parity` on one cut, or on several, as plain values."""
    return run_parity(path_or_id, None if cut is None else [cut], **options).as_dict()


def all_cuts(num_blocks: int) -> list[Cut]:
    """Return every legal cut of a model."""
    return [Cut(b, t) for b in range(num_blocks) for t in range(num_blocks - b)]


def count_blocks(model: PreTrainedModel) -> int:
    """Return the number of blocks of a model."""
    return int(model.config.get_text_config(decoder=True).num_hidden_layers)


def render(report: ParityReport, most: int = 20) -> str:
    """Return a table with the largest differences of each model, each failure, and the verdict."""
    stream = io.StringIO()
    console = Console(file=stream, width=120)
    console.print(_summary_table(report))
    failures = [row for row in report.rows if not row.ok]
    for row in failures[:most]:
        console.print(
            f"NOT EQUAL: {row.model}, {row.attention}, cut {row.cut}, padding {row.padding}: "
            f"logits {row.logits:.2e}, gradient {row.gradient:.2e} of {row.parameter}, "
            f"load_part {row.loaded}"
        )
    if len(failures) > most:
        console.print(f"and {len(failures) - most} more")
    total = len(report.rows)
    verdict = (
        f"{len(failures)} NOT EQUAL" if failures else "all equal" if total else "nothing tried"
    )
    console.print(f"{total} comparisons, tolerance {TOLERANCE:g}: {verdict}")
    return stream.getvalue()


def _summary_table(report: ParityReport) -> Table:
    groups: dict[tuple[str, str], list[ParityRow]] = {}
    for row in report.rows:
        groups.setdefault((row.model, row.attention), []).append(row)
    table = Table(title="Split against unsplit: the largest absolute differences")
    for name in ("model", "attention", "cuts", "comparisons", "logits", "gradients", "load_part"):
        table.add_column(name, overflow="fold")
    for (model, attention), rows in groups.items():
        table.add_row(
            model,
            attention,
            str(len({row.cut for row in rows})),
            str(len(rows)),
            f"{_worst(row.logits for row in rows):.2e}",
            f"{_worst(row.gradient for row in rows):.2e}",
            ", ".join(sorted({row.loaded.partition(":")[0] for row in rows})),
        )
    return table


def _worst(values: Iterable[float]) -> float:
    """The largest value; NaN, which `max` may drop, counts as the largest."""
    return max(values, key=lambda value: (math.isnan(value), value))


def _rows(
    name: str,
    whole: PreTrainedModel,
    parts: Parts,
    attention: str,
    cut: Cut,
    batch: int,
    tokens: int,
    loaded: str,
) -> list[ParityRow]:
    rows = []
    for padding in PADDINGS:
        ids_BT, mask_BT = example(whole.config, padding, batch=batch, tokens=tokens)
        gap = compare(whole, parts, ids_BT, mask_BT)
        figures = (gap.logits, gap.gradient, gap.parameter)
        rows.append(ParityRow(name, attention, str(cut), padding, *figures, loaded))
    log.info("%s, %s, cut %s: done", name, attention, cut)
    return rows


def _compare_loaded(path: str, parts: Parts, cut: Cut, attention: str, allow_untested: bool) -> str:
    """Load each role by itself and compare its tensors with those of the split model, bitwise."""
    bottom, top = load_client(path, cut, attention=attention, allow_untested=allow_untested)
    for own, want in ((bottom, parts.bottom), (top, parts.top)):
        if differs := _first_difference(own, want):
            return f"differ: {differs}"
    del bottom, top
    trunk = load_part("trunk", path, cut, attention=attention, allow_untested=allow_untested)
    differs = _first_difference(trunk, parts.trunk)
    return f"differ: {differs}" if differs else "equal"


def _first_difference(own: Part, want: Part) -> str:
    mine = {**dict(own.named_parameters()), **dict(own.named_buffers())}
    other = {**dict(want.named_parameters()), **dict(want.named_buffers())}
    for name in sorted(mine.keys() ^ other.keys()):
        return global_name(own, name)
    for name, tensor in mine.items():
        if not torch.equal(tensor, other[name]):
            return global_name(own, name)
    return ""


def _attentions(name: str, config: PretrainedConfig | None) -> tuple[str, ...]:
    if name == "both":
        return ATTENTIONS if config is None or has_sdpa(config) else ("eager",)
    if name not in ATTENTIONS:
        raise ValueError(f"unknown attention {name!r}; must be sdpa, eager or both")
    return (name,)


def _cuts(whole: PreTrainedModel, cuts: Sequence[Cut | tuple[int, int]] | None) -> list[Cut]:
    if cuts:
        return [cut if isinstance(cut, Cut) else Cut(*cut) for cut in cuts]
    blocks = count_blocks(whole)
    if blocks <= 4:
        return all_cuts(blocks)
    return [Cut(0, 0), Cut(1, 1), Cut(2, 1), Cut(blocks // 2, blocks // 4)]
