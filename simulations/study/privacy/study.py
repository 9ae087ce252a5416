"""Trains with each defence, attacks what crosses then, and keeps a line of each.

``graft study privacy`` leaves `runs.jsonl`, from which `privacy.md`, `privacy.json` and
`privacy.png` are made; what was cut off goes on where it was.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from simulations.audit.attack import attacks as attacks_there_are
from simulations.audit.audit import audit
from simulations.audit.recorder import Scope
from simulations.study.codecs.settings import Condition, parse_mix
from simulations.study.codecs.study import read_runs
from simulations.study.codecs.trained import train
from simulations.study.privacy import report
from simulations.study.privacy.settings import NOTHING, Defended, condition_of

Say = Callable[[str], None]


def study_privacy(
    model: str,
    points: Iterable[Defended],
    seeds: Sequence[int],
    folder: Path,
    *,
    attacks: Sequence[str] = (),
    sequences: int = 4,
    path: str = "",
    steps: int = 0,
    device: str = "cpu",
    say: Say = print,
) -> dict[str, Any]:
    """Run what is missing and make table and plot of all that is there.

    Parameters
    ----------
    model : str
        As `graft study codecs` has it: ``demo`` or ``smollm2``.
    points : iterable of Defended
        What is compared; what has no defence comes first, whether it is named or not.
    seeds : sequence of int
        Of training and attack.
    folder : Path
        Where `runs.jsonl` is, or will be.
    attacks : sequence of str
        Names; empty: all that `graft audit` has.
    sequences : int
        Attacked of each of two clients.
    path : str
        Of the weights; empty: the experiment's own.
    steps : int
        Of a training; 0: as suits the model.
    device : str
        Where models are trained and attacked.
    say : callable
        Hears of each run.

    Returns
    -------
    dict
        What `privacy.json` holds: see `report.summary`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    scope = Scope(sequences=sequences)
    for seed in seeds:
        for point in (NOTHING, *(each for each in points if each != NOTHING)):
            left = _left(read_runs(folder), (model, point.name, seed), attacks)
            if not left:
                continue
            own = condition_of(point, model, path, steps, device)
            line = _line(model, point, seed, own, left, scope)
            with (folder / "runs.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            say(f"{model}, seed {seed}, {point.name}: {report.in_words(line)}")
    return draw(folder)


def draw(folder: Path) -> dict[str, Any]:
    """Make table and plot of the runs in a folder; returns what `privacy.json` holds."""
    result = report.summary(read_runs(folder))
    (folder / "privacy.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (folder / "privacy.md").write_text(report.markdown(result), encoding="utf-8")
    report.plot(result, folder / "privacy.png")
    return result


def _line(
    model: str, point: Defended, seed: int, own: Condition, attacks: Sequence[str], scope: Scope
) -> dict[str, Any]:
    """Train and attack once."""
    run, config = train(own, parse_mix(point.codec), seed), own.config(seed)
    link = replace(config.link, codec=dict(parse_mix(point.codec).codecs))
    told = audit(replace(config, link=link), attacks, [seed], scope=scope)
    return {
        "model": model,
        "point": point.name,
        "family": point.family,
        "strength": point.strength,
        "seed": seed,
        "steps": own.steps,
        "loss": run.loss_with,
        "heldout_tokens": run.heldout_tokens,
        "attacks": list(attacks),
        "rows": told["rows"],
        "refused": told["refused"],
        "seconds": round(run.seconds + told["seconds"], 1),
    }


def _left(
    runs: Iterable[Mapping[str, Any]], key: tuple[str, str, int], asked: Sequence[str]
) -> list[str]:
    """The attacks that were not yet tried on a point, of those that are asked for; none: all."""
    own = [run for run in runs if (run["model"], run["point"], run["seed"]) == key]
    tried = {name for run in own for name in run["attacks"]}
    return [name for name in asked or attacks_there_are() if name not in tried]
