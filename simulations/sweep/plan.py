"""From what was asked for to a sweep whose every point has been checked, before anything starts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from conf.load import load_config
from conf.rules import ConfigError
from conf.schema import Config
from flower_app.runs.folders import new_folder
from simulations.launch.machine import check_machine, look_at_machine
from simulations.launch.preflight import FLOWERS_CLIENTS, check_config, check_deployed
from simulations.sweep.points import Expanded, expand
from simulations.sweep.results import check_measures
from simulations.sweep.spec import CLIENTS, Spec
from simulations.sweep.state import (
    FILE,
    Point,
    Sweep,
    counted,
    read_sweep,
    sweeps_folder,
    write_sweep,
)

Say = Callable[[str], None]


def plan(spec: Spec, superlink: str, say: Say) -> tuple[Sweep, list[Config]]:
    """Return the sweep with all its points, and their configurations, each checked as a run is.

    Parameters
    ----------
    spec : Spec
        What was asked for.
    superlink : str
        A connection of the user's Flower configuration; empty: simulated here.
    say : callable
        Takes what the user should know.

    Raises
    ------
    ValueError
        If anything is wrong with any point.
    """
    check_clients(spec, superlink)
    check_measures(spec.plot)
    if spec.spans:
        raise ConfigError(
            f"{next(iter(spec.spans))} has an interval, which is sampled from: add --search N, or "
            "give its values, separated by commas"
        )
    found = expand(spec, 0 if superlink else FLOWERS_CLIENTS)
    if found.doubles:
        say(f"left out, for others say the same: {counted(found.doubles, 'combination')}")
    if found.excluded:
        say(f"excluded: {counted(found.excluded, 'combination')}")
    if not superlink:
        for note in check_machine(look_at_machine()):
            say(note)
    _check(found, superlink)
    sweep = Sweep(
        name=spec.name,
        experiment=spec.experiment,
        keys=found.keys,
        points=found.points,
        superlink=superlink,
        plot=list(spec.plot),
    )
    return sweep, found.configs


def check_clients(spec: Spec, superlink: str) -> None:
    """Refuse to choose how many clients a SuperLink has."""
    named = {*spec.fixed, *spec.grid, *(key for part in spec.include for key in part)}
    named |= {key for lists in spec.zipped for key in lists}
    if superlink and CLIENTS in named:
        raise ConfigError(
            f"the number of clients is the SuperLink's: '{superlink}' has as many as SuperNodes "
            "are connected to it. Leave out clients, or --superlink",
            key=CLIENTS,
        )


def checked(config: Config, point: Point, superlink: str) -> Config:
    """Check a point as a run of its own is; a ConfigError names the point."""
    try:
        return check_deployed(config) if superlink else check_config(config, point.clients)
    except ValueError as error:
        words = f"{error}; at the point {point.name}"
        raise ConfigError(words, key=getattr(error, "key", "")) from error


def _check(found: Expanded, superlink: str) -> None:
    """Check every point; the model that `last:NAME` is now stays the same for all of them."""
    for point, config in zip(found.points, found.configs, strict=True):
        path = checked(config, point, superlink).model.path
        if path != config.model.path and not superlink:
            point.overrides.append(f"model.path={path}")


def make_folder(sweep: Sweep) -> Path:
    """Make the folder of a new sweep, with its state."""
    folder = new_folder(sweeps_folder(), sweep.name)
    write_sweep(folder, sweep)
    return folder


def config_of(sweep: Sweep, point: Point) -> Config:
    """Return the configuration of a point."""
    return load_config(sweep.experiment, point.overrides)


def same_but_open(sweep: Sweep, folder: Path) -> Path | None:
    """Return a sweep of the same points that was not finished, if there is one."""
    for path in sorted(folder.glob(f"*/{FILE}"), reverse=True):
        try:
            other = read_sweep(path.parent)
        except ValueError:
            continue
        told = [(each.overrides, each.clients) for each in other.points]
        mine = [(each.overrides, each.clients) for each in sweep.points]
        same = other.experiment == sweep.experiment and told == mine
        if same and any(point.open for point in other.points):
            return path.parent
    return None
