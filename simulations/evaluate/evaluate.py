"""Evaluates what was trained on a file, in each of the ways it can be run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from conf.load import load_config
from flower_app.serving.source import find_served, load_tokenizer
from models import Cut
from simulations.evaluate.figures import evaluate
from simulations.evaluate.texts import answers_of, read_texts
from simulations.evaluate.ways import WAYS, Place

ALL = "all"


def run_evaluation(
    text: str,
    file: Path,
    *,
    how: str = "split",
    access: Path | None = None,
    cut: Cut | None = None,
    dtype: str = "fp32",
    changes: Sequence[str] = (),
    batch_size: int = 8,
    limit: int = 0,
    generate: bool = True,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Evaluate a run or a model on a file.

    Parameters
    ----------
    text : str
        As for `find_served`.
    file : Path
        What it is evaluated on.
    how : str
        One of `WAYS`, or ``all``.
    access : Path, optional
        The access file of a trunk that is served; None: one is started for ``served``.
    cut : Cut, optional
        Needed for what is no run's.
    dtype : str
        Type of the weights.
    changes, limit
        As for `read_texts`.
    batch_size, generate
        As for `figures.evaluate`.
    say : callable
        Told what is going on.

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
    if how not in (*WAYS, ALL):
        raise ValueError(f"--how is {how!r}, must be one of {', '.join((*WAYS, ALL))}")
    served = find_served(text, cut)
    config = load_config(str(served.run / "config.yaml")) if served.run is not None else None
    tokenizer, place = load_tokenizer(served), Place(served=served, access=access, dtype=dtype)
    ways = list(WAYS) if how == ALL else [how]
    examples, found = None, {}
    for way in ways:
        with WAYS[way](place) as model:
            if examples is None:
                examples = read_texts(
                    file, tokenizer, model.config, config=config, changes=changes, limit=limit
                )
            say(f"{way}: {len(examples)} examples")
            found[way] = asdict(
                evaluate(model, tokenizer, examples, batch_size=batch_size, generate=generate)
            )
    assert examples is not None
    losses = [each["loss"] for each in found.values()]
    return {
        "model": served.name,
        "fingerprint": served.fingerprint,
        "cut": str(served.cut),
        "data": str(file),
        "examples": len(examples),
        "tokens": sum(int((example.labels[1:] >= 0).sum()) for example in examples),
        "answers": len(answers_of(examples)) if generate else None,
        **found,
        **({"loss_gap": max(losses) - min(losses)} if len(losses) > 1 else {}),
    }
