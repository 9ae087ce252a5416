"""Evaluates what was trained on a file, in each of the ways it can be run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from conf.load import load_config
from flower_app.data.client import IGNORED, Example
from flower_app.serving.source import Served, find_served, load_tokenizer
from models import Cut
from simulations.evaluate.figures import Figures, evaluate
from simulations.evaluate.texts import answers_of, read_texts
from simulations.evaluate.ways import WAYS, Place

ALL = "all"


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is evaluated, on what, and how."""

    model: str
    """As for `find_served`."""
    data: Path
    """File or folder."""
    how: str = "split"
    """One of `WAYS`, or ``all``."""
    access: Path | None = None
    """Access file of a trunk that is served; None: one is started for it."""
    cut: Cut | None = None
    """Needed for what is no run's."""
    dtype: str = "fp32"
    changes: Sequence[str] = ()
    """``data.KEY=VALUE``: how the file is read, if not as the run's."""
    batch_size: int = 8
    limit: int = 0
    """Most examples; 0: all."""
    generate: bool = True
    """Whether completions are generated, for the exact match."""


def run_evaluation(question: Question, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Evaluate a run or a model on a file.

    Returns
    -------
    dict
        `model`, `fingerprint`, `cut`, `data`, `examples`, `tokens`, `answers`; by way its figures;
        with several ways `loss_gap`, the largest difference of their losses.

    Raises
    ------
    ValueError
        If model, file or way cannot be used.
    """
    if question.how not in (*WAYS, ALL):
        raise ValueError(f"--how is {question.how!r}, must be one of {', '.join((*WAYS, ALL))}")
    served = find_served(question.model, question.cut)
    examples, found = _by_way(question, served, say)
    losses = [figures.loss for figures in found.values()]
    return {
        "model": served.name,
        "fingerprint": served.fingerprint,
        "cut": str(served.cut),
        "data": str(question.data),
        "examples": len(examples),
        "tokens": sum(int((example.labels[1:] != IGNORED).sum()) for example in examples),
        "answers": len(answers_of(examples)) if question.generate else None,
        **{way: asdict(figures) for way, figures in found.items()},
        **({"loss_gap": max(losses) - min(losses)} if len(losses) > 1 else {}),
    }


def _by_way(
    question: Question, served: Served, say: Callable[[str], None]
) -> tuple[list[Example], dict[str, Figures]]:
    """The examples, and what each way came to; one model at a time is in memory."""
    config = load_config(str(served.run / "config.yaml")) if served.run is not None else None
    place = Place(
        source=question.model, served=served, access=question.access, dtype=question.dtype
    )
    tokenizer = load_tokenizer(served)
    examples: list[Example] = []
    found: dict[str, Figures] = {}
    for way in WAYS if question.how == ALL else (question.how,):
        with WAYS[way](place) as model:
            if not examples:
                examples = read_texts(
                    question.data,
                    tokenizer,
                    model.config,
                    config=config,
                    changes=question.changes,
                    limit=question.limit,
                )
            say(f"{way}: {len(examples)} examples")
            found[way] = evaluate(
                model,
                tokenizer,
                examples,
                batch_size=question.batch_size,
                generate=question.generate,
            )
    return examples, found
