"""Where a run that was stopped goes on, and what may be changed then."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from conf.load import from_before, override, to_dict
from conf.places import follow_model
from conf.rules import ConfigError
from conf.schema import Config
from conf.sections.link import in_words
from flower_app.runs import checkpoint
from flower_app.runs.checkpoint import Checkpoint, Damaged
from flower_app.runs.folders import (
    CHECKPOINTS,
    FINISHED,
    RunLock,
    find_run,
    folders,
    read_summary,
)

FREE = ("link", "runtime", "output", "federation", "tracking")
"""Sections that do not say what is computed, or whose change is the operator's to answer for."""
FIXED = ("link.codec", "link.transport", "output.folder")
"""What of them stays as it was."""
UNTIL = ("train.rounds", "train.patience")
"""How long a run goes on, not what is computed until then."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """A run between two rounds, from which it goes on."""

    run: Path
    source: Path
    """The checkpoint, or the run folder if none was named."""
    number: int
    """The last round that is trained."""
    config: Config
    clients: list[str]
    """Who was connected."""
    started: str
    seconds: float
    notes: list[str] = field(default_factory=list)
    """What the user should know."""
    state: dict[str, Any] = field(default_factory=dict)
    lock: RunLock | None = None
    """Of the run folder, held."""

    @property
    def unevaluated(self) -> bool:
        """Whether the last round's evaluation is to be made up for."""
        return self.state.get("unevaluated") is not None


def take_up(resume: str, overrides: str | list[str] = "") -> Point:
    """Read all that a run needs to go on, and take the right to write its folder.

    Parameters
    ----------
    resume : str
        A run folder, whose newest checkpoint is taken, or one of its checkpoints.
    overrides : str or list of str
        Changes to its configuration.

    Raises
    ------
    ValueError
        If it cannot go on, or must not with these changes: why, and what to do.
    """
    run, wanted = _find(resume)
    lock = RunLock(run)
    try:
        return _point(run, wanted, overrides, lock)
    except BaseException:
        lock.release()
        raise


def look_up(resume: str, overrides: str | list[str] = "") -> Point:
    """Find out whether a run can go on, and where; as `take_up`, without its state and lock."""
    run, wanted = _find(resume)
    RunLock(run).release()
    return _point(run, wanted, overrides, None)


def _point(
    run: Path, wanted: int | None, overrides: str | list[str], lock: RunLock | None
) -> Point:
    found = _read(run, wanted, load=lock is not None)
    facts = found.facts
    before, notes = config_of(found)
    config = override(before, overrides)
    notes += _check_changes(before, config)
    if found.torch != torch.__version__:
        notes.append(
            f"the checkpoint was written with torch {found.torch}, and this is "
            f"{torch.__version__}: losses may differ in the last digits"
        )
    _check_unfinished(run, wanted, before, config)
    return Point(
        run=run,
        source=run if wanted is None else found.folder,
        number=facts.round,
        config=config,
        clients=facts.clients,
        started=facts.started,
        seconds=facts.seconds,
        notes=notes,
        state=found.state,
        lock=lock,
    )


def config_of(found: Checkpoint) -> tuple[Config, list[str]]:
    """Return the configuration of a checkpoint's run, with what moved since where it is now.

    Returns
    -------
    Config
        The run's.
    list of str
        What to tell of keys that were renamed or are new, and of paths that moved.
    """
    run = found.folder.parents[1]
    try:
        before, notes = from_before(found.facts.config)
    except ConfigError as error:
        raise ValueError(
            f"{found.folder} holds a configuration that is no more: {error}"
        ) from error
    before, moved = follow_model(_where_it_is(before, run), run)
    return before, notes + moved


def _where_it_is(config: Config, run: Path) -> Config:
    """The configuration with the folder that the run lies in now, if it names one."""
    output = config.output
    return replace(config, output=replace(output, folder=output.folder and str(run.parent)))


def _find(resume: str) -> tuple[Path, int | None]:
    """Return the run folder, and the round of a checkpoint if one is named."""
    folder = find_run(resume)
    if folder.parent.name == CHECKPOINTS:
        named = {path: number for number, path in folders(folder.parents[1])}
        if folder not in named:
            raise ValueError(f"{folder} is no checkpoint: its name is not round- and a number")
        return folder.parents[1], named[folder]
    if not (folder / "config.yaml").is_file():
        raise ValueError(
            f"{folder} is no run folder: it has no config.yaml. Give the folder that a run printed "
            "as `run folder: ...` (`graft runs` lists them)"
        )
    return folder, None


def _read(run: Path, wanted: int | None, *, load: bool) -> Checkpoint:
    """Read the wanted checkpoint, or the newest; a damaged one is refused, and one before named."""
    there = folders(run)
    if not there:
        raise ValueError(
            f"{run} has no checkpoint: it ended before its first round did, or had "
            f"output.checkpoint_every=0. Begin it anew: graft run {run / 'config.yaml'}"
        )
    there = [(number, path) for number, path in there if wanted is None or number <= wanted]
    try:
        return checkpoint.read(there[-1][1], load=load)
    except Damaged as error:
        raise Damaged(f"{error}. {_offer(run, [path for _, path in there[:-1]])}") from error


def _offer(run: Path, before: list[Path]) -> str:
    for path in reversed(before):
        try:
            checkpoint.read(path, load=False)
        except ValueError:
            continue
        return f"The one before it is whole: resume='{path}' (or `graft resume {path}`)"
    return f"There is none before it that is whole; begin anew: graft run {run / 'config.yaml'}"


def _check_changes(before: Config, config: Config) -> list[str]:
    """Refuse changes of what is computed; returns what to tell of those that are allowed."""
    old, new = _flat(before), _flat(config)
    for key in new:
        if new[key] == old[key] or key in UNTIL:
            continue
        if key.partition(".")[0] not in FREE or key in FIXED:
            raise ConfigError(
                f"{key} was {in_words(old[key])!r} and cannot become {in_words(new[key])!r} when a "
                "run is resumed: it would be another run. Leave it out, or begin a new one; free "
                "to change are "
                f"{', '.join(f'{name}.*' for name in FREE)} (but not {', '.join(FIXED)}), "
                "train.patience and, upwards, train.rounds",
                key=key,
            )
    rounds, train = before.train.rounds, config.train
    if train.rounds < rounds:
        raise ConfigError(
            f"train.rounds was {rounds} and cannot become {train.rounds} when a run is resumed: it "
            "can only be raised",
            key="train.rounds",
        )
    if train.rounds > rounds and (train.schedule != "constant" or train.warmup):
        return [
            f"train.rounds goes from {rounds} to {train.rounds}: learning rates from here on are "
            f"those of {train.rounds} rounds, those before were those of {rounds}"
        ]
    return []


def _flat(config: Config) -> dict[str, Any]:
    return {
        f"{section}.{key}" if isinstance(values, dict) else section: value
        for section, values in to_dict(config).items()
        for key, value in (values if isinstance(values, dict) else {"": values}).items()
    }


def _check_unfinished(run: Path, wanted: int | None, before: Config, config: Config) -> None:
    """Refuse a run with nothing left to do. Without a summary, the model is left to be saved."""
    summary = read_summary(run) or {}
    done = summary.get("rounds", 0)
    if summary.get("status") != FINISHED or (wanted is not None and wanted < done):
        return
    if done >= config.train.rounds:
        raise ValueError(
            f"{run} is finished: all {done} rounds are done, and there is nothing to resume. To "
            f"train on, raise train.rounds (overrides='train.rounds={done + 1}'); to repeat "
            f"rounds, name a checkpoint (resume='{run / CHECKPOINTS}/round-...')"
        )
    patience = before.train.patience
    if (why := summary.get("stopped_early")) and 0 < config.train.patience <= patience:
        raise ValueError(
            f"{run} is finished: it stopped after round {done}, for {why}. To train on, raise "
            f"train.patience (overrides='train.patience={patience + 1}'), or set it to 0"
        )
