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
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import PreTrainedModel

from conf.schema import (
    AggregationConfig,
    Config,
    CutConfig,
    DataConfig,
    FederationConfig,
    LinkConfig,
    LoraSettings,
    ModelConfig,
    OutputConfig,
    TrainConfig,
    TuningConfig,
)
from models import Cut, build_scratch, split
from models.scratch import has_sdpa, load_whole
from models.tiny import roughen, tiny_config
from models.verify import PADDINGS, TOLERANCE, compare, example
from simulations.equivalence_runs import (
    Client,
    Cohort,
    Federation,
    Gap,
    Reference,
    exact_lora,
    fed_prox_round,
    largest_difference,
    random_steps,
    side_by_side,
    unsplit,
)
from simulations.inprocess import read_tensors, run_app
from simulations.parity import all_cuts, count_blocks
from simulations.reference import centralised_round, fed_avg_round, plain_optimizer, train_whole

LARGE = 20_000_000
"""Parameters from which a model is trained with LoRA and in fewer steps."""

TELLING = 20
"""A difference says something if training moved the weights by so many tolerances, at least."""

CUTS = (Cut(1, 1), Cut(2, 1), Cut(1, 2))
"""Of three clients with cuts of their own."""

MODES = {
    "all": ("full", "full", "full"),
    "LoRA": ("lora", "lora", "lora"),
    "trunk": ("frozen", "full", "frozen"),
    "trunk LoRA": ("frozen", "lora", "frozen"),
}
"""What is trained in bottom, trunk and top."""

SMALLER = {"all": "LoRA", "trunk": "trunk LoRA"}
"""What a large model trains instead."""


OPTIMIZERS = {"sgd": "SGD", "adamw": "AdamW"}


class NotTriedError(Exception):
    """Why a claim says nothing about a model."""


@dataclass(frozen=True)
class Subject:
    """A model that claims are tried on."""

    name: str
    model: PreTrainedModel
    """Untuned, without dropout; nothing changes it."""
    folder: Path
    """The same as a checkpoint."""
    tokenizer: str
    large: bool = False
    allow_untested: bool = False

    @property
    def steps(self) -> int:
        """Optimizer steps of a round of merged training; other claims take fewer."""
        return 2 if self.large else 10

    @property
    def cut(self) -> Cut:
        """The smallest ends that have a block each."""
        return Cut(1, 1) if count_blocks(self.model) > 2 else Cut(0, 0)


@dataclass(frozen=True)
class Claim:
    """One row of the table for each model."""

    text: str
    measure: Callable[[Subject, Claim], Gap]
    tolerance: float
    trains: str = ""
    """One of `MODES`; empty: nothing."""
    optimizer: str = ""
    train: dict[str, Any] = field(default_factory=dict)


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
            subjects = [_checkpoint(model, attention, allow_untested, Path(scratch))]
        else:
            subjects = [_tiny(family, attention, Path(scratch)) for family in families]
        for claim in CLAIMS if claims is None else claims:
            for subject in subjects:
                own = claim
                if subject.large:
                    own = replace(claim, trains=SMALLER.get(claim.trains, claim.trains))
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


def _trains(claim: Claim) -> str:
    return f"{claim.trains}, {OPTIMIZERS[claim.optimizer]}" if claim.trains else ""


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


# ---- the models -------------------------------------------------------------------------------


def _tiny(family: str, attention: str, scratch: Path) -> Subject:
    """A random model of four blocks that embeds bytes; GPT-2's embedding is tied."""
    config = tiny_config(family, vocab_size=259)
    how = attention if attention != "both" else "sdpa" if has_sdpa(config) else "eager"
    model = roughen(build_scratch(config, 0, attention=how)).eval()
    tied = bool(getattr(config, "tie_word_embeddings", False))
    name = f"tiny {family}" + (", tied" if tied else "")
    return Subject(name, model, _saved(model, scratch / family), "bytes")


def _checkpoint(path: str, attention: str, allow_untested: bool, scratch: Path) -> Subject:
    """A checkpoint with its dropout taken out: draws are no part of what is compared."""
    how = "sdpa" if attention == "both" else attention
    try:
        model = load_whole(path, attention=how)
    except ValueError:
        if attention != "both":
            raise
        model = load_whole(path, attention="eager")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    text = model.config.get_text_config(decoder=True)
    for name, value in text.to_dict().items():
        if isinstance(value, float) and (name.endswith("pdrop") or "dropout" in name):
            setattr(text, name, 0.0)
    large = sum(parameter.numel() for parameter in model.parameters()) >= LARGE
    name = Path(path).stem if path.endswith(".gguf") else Path(path).name
    folder = _saved(model, scratch / "model")
    return Subject(name, model.eval(), folder, path, large, allow_untested)


def _saved(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums in one order, whatever the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# ---- what is compared -------------------------------------------------------------------------


def split_is_unsplit(subject: Subject, claim: Claim) -> Gap:
    """Logits and every gradient, at a few cuts and every padding."""
    blocks = count_blocks(subject.model)
    cuts = all_cuts(blocks)
    if blocks > 4:
        cuts = [Cut(1, 1), Cut(blocks // 2, blocks // 4)]
    worst = 0.0
    for cut in cuts:
        parts = split(subject.model, cut, allow_untested=subject.allow_untested)
        for padding in PADDINGS:
            found = compare(subject.model, parts, *example(subject.model.config, padding))
            worst = max(worst, found.logits, found.gradient)
    return Gap(worst)


def one_client(subject: Subject, claim: Claim) -> Gap:
    """One client's steps, and the same steps of the unsplit model."""

    def alone(whole: PreTrainedModel, cohort: Cohort, *rest: Any) -> None:
        train_whole(whole, cohort[0], *rest)

    steps = 3 if subject.large else 6
    cohort = [_steps(subject, steps, seed=1, accumulate=2, padding="left")]
    return _compared(subject, claim, [cohort], alone, accumulate=2)


def fed_avg(
    subject: Subject, claim: Claim, *, mixed: bool = False, reference: Reference = fed_avg_round
) -> Gap:
    """Three clients of unequal steps and batches, two rounds; `mixed`: of three cuts."""
    if mixed and count_blocks(subject.model) < 4:
        raise NotTriedError(f"cuts {CUTS} need 4 blocks, it has {count_blocks(subject.model)}")
    clients = [Client(cut, 4) for cut in CUTS] if mixed else None
    cohorts = _unequal(subject)
    return _compared(subject, claim, cohorts, reference, clients, accumulate=2)


def centralised(subject: Subject, claim: Claim) -> Gap:
    """Three clients of unequal batches, lengths and paddings, two rounds; one optimizer for all."""
    cohorts = [
        [
            _steps(subject, subject.steps, seed=17 * number + 1000 * client, padding=padding)
            for client, padding in enumerate(("left", "right", "none"))
        ]
        for number in (1, 2)
    ]
    config = _config(subject, claim)
    whole = unsplit(subject.model, config)
    optimizer = plain_optimizer(whole, config.train)

    def reference(
        model: PreTrainedModel, cohort: Cohort, train: TrainConfig, number: int, rounds: int
    ) -> None:
        centralised_round(model, cohort, train, number, rounds, optimizer=optimizer)

    federation = _federation(subject, config)
    return side_by_side(federation, whole, config.train, cohorts, reference)


def exact_mean(subject: Subject, claim: Claim) -> Gap:
    """Clients of three ranks and, where there are blocks for it, three cuts."""
    cuts = CUTS if count_blocks(subject.model) >= 4 else (subject.cut,) * 3
    clients = [Client(cut, rank) for cut, rank in zip(cuts, (4, 2, 6), strict=True)]
    config = replace(
        _config(subject, claim, accumulate=2), aggregation=AggregationConfig(lora="exact")
    )
    federation = _federation(subject, config, clients)
    return exact_lora(federation, _unequal(subject), config.lora.alpha)


def transports(subject: Subject, claim: Claim) -> Gap:
    """Both apps whole, once with a stream to the trunk, once with nothing but messages."""
    clients = 1 if claim.train["strategy"] == "splitfed-v2" else 2 if subject.large else 3
    saved = []
    with tempfile.TemporaryDirectory(prefix="graft-parity-") as folder:
        for transport in ("stream", "messages"):
            config = _app_config(subject, claim, transport, clients, folder)
            saved.append(run_app(config, clients))
    first = read_tensors(subject.folder)
    # lora_B starts at zero.
    moved = [t for name, t in saved[0].items() if ".lora_B." in name]
    moved += [t - first[name] for name, t in saved[0].items() if name in first]
    return Gap(largest_difference(*saved), max(float(t.abs().max()) for t in moved))


def _compared(
    subject: Subject,
    claim: Claim,
    cohorts: Sequence[Cohort],
    reference: Reference,
    clients: Sequence[Client] | None = None,
    **train: Any,
) -> Gap:
    config = _config(subject, claim, rounds=len(cohorts), **train)
    clients = clients or [Client(subject.cut, config.lora.rank)] * len(cohorts[0])
    federation = _federation(subject, config, clients)
    whole = unsplit(subject.model, config)
    return side_by_side(federation, whole, config.train, cohorts, reference)


def _federation(
    subject: Subject, config: Config, clients: Sequence[Client] | None = None
) -> Federation:
    clients = clients or [Client(subject.cut, config.lora.rank)] * 3
    return Federation(subject.model, config, clients, allow_untested=subject.allow_untested)


def _config(subject: Subject, claim: Claim, **train: Any) -> Config:
    values = {"rounds": 2, "clip": 0.5, "weight_decay": 0.01, "schedule": "cosine"}
    values |= {"optimizer": claim.optimizer, **train, **claim.train}
    values.setdefault("lr", 0.3 if claim.optimizer == "sgd" else 3e-3)
    bottom, trunk, top = MODES[claim.trains]
    return Config(
        cut=CutConfig(bottom=subject.cut.bottom, top=subject.cut.top),
        tuning=TuningConfig(bottom=bottom, trunk=trunk, top=top),
        lora=LoraSettings(rank=4),
        train=TrainConfig(**values),  # type: ignore[arg-type]
    )


def _app_config(
    subject: Subject, claim: Claim, transport: str, clients: int, folder: str
) -> Config:
    steps = 1 if subject.large else 3
    config = _config(subject, claim, local_steps=steps, batch_size=2, accumulate=2)
    return replace(
        config,
        model=ModelConfig(
            path=str(subject.folder),
            tokenizer=subject.tokenizer,
            attention=str(subject.model.config._attn_implementation),
            allow_untested=subject.allow_untested,
        ),
        data=DataConfig(context=24, max_examples=12, heldout=0.2),
        federation=FederationConfig(
            min_clients=clients, quorum=1.0, round_timeout=600.0, fraction_evaluate=0.0
        ),
        link=LinkConfig(transport=transport),
        output=OutputConfig(folder=folder),
    ).check()


def _unequal(subject: Subject) -> list[list[list[list[Any]]]]:
    """Two rounds of three clients of unequal steps, batch sizes, lengths and paddings."""
    least = 1 if subject.large else 2
    return [
        [
            _steps(
                subject,
                least + client,
                seed=1000 * number + 10 * client,
                accumulate=1 + client % 2,
                padding=("left", "right", "none")[client],
            )
            for client in range(3)
        ]
        for number in (1, 2)
    ]


def _steps(subject: Subject, count: int, **how: Any) -> list[list[Any]]:
    text = subject.model.config.get_text_config(decoder=True)
    return random_steps(count, vocabulary=text.vocab_size, **how)


# ---- the claims -------------------------------------------------------------------------------

_SGD, _ADAMW, _MERGED_ADAMW, _TRANSPORTS = 1e-5, 1e-4, 2e-4, 2e-5
"""Largest differences of weights. AdamW divides by the root of the second moment."""

_FEDAVG = "splitfed-v1 = FedAvg of the unsplit model"
_PROX = "splitfed-v1, prox = FedProx of the unsplit model"
_CUTS = "splitfed-v1, three cuts = FedAvg of the unsplit"
_MERGED = "merged, sync=step = centralised training"
_FROZEN = "merged, sync=round, ends frozen = centralised"
_EXACT = "exact LoRA: effective weights = clients' mean"
_STEP: dict[str, Any] = {"strategy": "merged", "sync": "step"}
_mixed = partial(fed_avg, mixed=True)
_prox = partial(fed_avg, reference=fed_prox_round)


def _transports(text: str, **train: Any) -> Claim:
    return Claim(f"stream = messages: {text}", transports, _TRANSPORTS, "all", "adamw", train)


CLAIMS: tuple[Claim, ...] = (
    Claim("split = unsplit: logits, every gradient", split_is_unsplit, TOLERANCE),
    Claim("one client = unsplit training", one_client, _SGD, "all", "sgd"),
    Claim("one client = unsplit training", one_client, _ADAMW, "all", "adamw"),
    Claim(_FEDAVG, fed_avg, _SGD, "all", "sgd"),
    Claim(_FEDAVG, fed_avg, _ADAMW, "all", "adamw"),
    Claim(_FEDAVG, fed_avg, _ADAMW, "LoRA", "adamw"),
    Claim(_PROX, _prox, _SGD, "all", "sgd", {"prox": 5.0}),
    Claim(_CUTS, _mixed, _SGD, "all", "sgd"),
    Claim(_CUTS, _mixed, _ADAMW, "all", "adamw"),
    Claim(_CUTS, _mixed, _ADAMW, "LoRA", "adamw"),
    Claim(_MERGED, centralised, _SGD, "all", "sgd", _STEP),
    Claim(_MERGED, centralised, _MERGED_ADAMW, "all", "adamw", _STEP),
    Claim(_MERGED, centralised, _SGD, "LoRA", "sgd", _STEP),
    Claim(_FROZEN, centralised, _SGD, "trunk", "sgd", {"strategy": "merged"}),
    Claim(_EXACT, exact_mean, 1e-6, "LoRA", "adamw"),
    _transports("splitfed-v1", strategy="splitfed-v1"),
    _transports("splitfed-v2, one client", strategy="splitfed-v2"),
    _transports("merged, sync=round", strategy="merged"),
    _transports("merged, sync=step", **_STEP),
    # A resumed run, once there are checkpoints: Claim("resumed = not stopped", resumed, 0.0, "all")
)
"""Every row of the table; a claim is added here."""
