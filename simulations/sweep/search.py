"""`--search N`: points that Optuna samples one after another, and ends early where hopeless.

What it learns is in `optuna.log` of the sweep's folder, so that a search goes on after a kill.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conf.rules import ConfigError
from flower_app.runs.history import read_history
from simulations.launch.preflight import FLOWERS_CLIENTS
from simulations.sweep.grammar import Interval
from simulations.sweep.plan import check_clients, checked
from simulations.sweep.points import (
    Setting,
    clients_of,
    load_setting,
    make_point,
    overrides_of,
    typed,
)
from simulations.sweep.spec import SEED, Spec
from simulations.sweep.state import CRASHED, FINISHED, PRUNED, Point, Sweep
from simulations.sweep.task import Task

PRUNERS = ("median", "hyperband", "none")
FILE = "optuna.log"
MOST_REPEATS = 20
"""Proposals of settings that were tried before, one after another, after which a search is over."""


def require_optuna() -> None:
    """Refuse a search without Optuna, with the remedy."""
    if importlib.util.find_spec("optuna") is None:
        raise ConfigError(
            "--search needs Optuna, which is not installed: pip install 'graft[search]'"
        )


def plan_search(spec: Spec, pruner: str, superlink: str, say: Callable[[str], None]) -> Sweep:
    """Return a sweep without points yet, whose spans and choices have been checked.

    Parameters
    ----------
    spec : Spec
        What was asked for.
    pruner : str
        Of `PRUNERS`.
    superlink, say
        As in `plan`.

    Raises
    ------
    ValueError
        If an end of a span, or a choice, is none that a run may have.
    """
    require_optuna()
    if pruner not in PRUNERS:
        raise ConfigError(f"--pruner {pruner}: there are {', '.join(PRUNERS)}")
    _check_kind(spec)
    check_clients(spec, superlink)
    default = 0 if superlink else FLOWERS_CLIENTS
    start = _start(spec)
    for setting in (start, *_corners(spec, start)):
        config, clients = load_setting(spec, setting), clients_of(spec, setting, default)
        point = make_point(0, spec, setting, config, clients, [])
        found = checked(config, point, superlink)
        if config.federation.fraction_evaluate == 0 or config.data.heldout == 0:
            raise ConfigError(
                "a search goes by the held-out loss: set federation.fraction_evaluate and "
                "data.heldout above 0"
            )
    fixed = dict(spec.fixed)
    if found.model.path != config.model.path and not superlink:
        fixed["model.path"] = found.model.path
    for key, span in spec.spans.items():
        scale = "by the logarithm" if span.log else "evenly"
        say(f"{key}: sampled {scale} from {span.low:g} to {span.high:g}")
    return Sweep(
        name=spec.name,
        experiment=spec.experiment,
        keys=[*spec.grid, *spec.spans],
        points=[],
        superlink=superlink,
        plot=list(spec.plot),
        search={
            "points": spec.search,
            "pruner": pruner,
            "fixed": fixed,
            "choices": spec.grid,
            "spans": {key: [span.low, span.high, span.whole] for key, span in spec.spans.items()},
        },
    )


def _check_kind(spec: Spec) -> None:
    if spec.zipped or spec.when or spec.include or spec.exclude:
        raise ConfigError("a search has choices (a,b,c) and intervals, and nothing else: leave out "
                          "zip, when, include and exclude")  # fmt: skip
    if SEED in spec.grid:
        raise ConfigError("a search has one seed: give seed=0, say, and sweep the best settings "
                          "over seeds afterwards")  # fmt: skip
    if not (spec.grid or spec.spans):
        raise ConfigError("there is nothing to search: give a key an interval, such as "
                          "'train.lr=interval(1e-4,1e-2)', or choices")  # fmt: skip


def _start(spec: Spec) -> Setting:
    ends = {key: _text(span.low, span.whole) for key, span in spec.spans.items()}
    return {key: texts[0] for key, texts in spec.grid.items()} | ends


def _corners(spec: Spec, start: Setting) -> list[Setting]:
    """Settings in which one key is at another choice, or at the other end of its span."""
    found = [start | {key: text} for key, texts in spec.grid.items() for text in texts[1:]]
    ends = [{key: _text(span.high, span.whole)} for key, span in spec.spans.items()]
    return found + [start | end for end in ends]


def _text(value: Any, whole: bool) -> str:
    return str(int(value)) if whole else f"{value:.6g}"


class Sampled:
    """Points as Optuna proposes them.

    Parameters
    ----------
    folder : Path
        The sweep's.
    sweep : Sweep
        With what `plan_search` put into `search`; points are appended to it.
    """

    def __init__(self, folder: Path, sweep: Sweep) -> None:
        require_optuna()
        import optuna
        from optuna.storages.journal import JournalFileBackend

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._optuna, self._sweep, self._search = optuna, sweep, sweep.search
        self._default = 0 if sweep.superlink else FLOWERS_CLIENTS
        self._left = [point for point in sweep.points if point.open]
        self._spec = Spec(name=sweep.name, experiment=sweep.experiment, fixed=self._search["fixed"])
        storage = optuna.storages.JournalStorage(JournalFileBackend(str(folder / FILE)))
        self._study = optuna.create_study(
            storage=storage,
            study_name=sweep.name,
            load_if_exists=True,
            pruner=self._pruner(),
            # Seeded anew with each try: the first proposals are not made twice.
            sampler=optuna.samplers.TPESampler(seed=len(sweep.points), n_startup_trials=5),
        )
        self._reported: dict[str, int] = {}
        self._catch_up()

    def _pruner(self) -> Any:
        pruners = self._optuna.pruners
        kinds = {"median": pruners.MedianPruner, "hyperband": pruners.HyperbandPruner}
        return kinds.get(self._search["pruner"], pruners.NopPruner)()

    def _catch_up(self) -> None:
        """Tell the study what a kill kept from it: points that ended, proposals never run."""
        points = {int(point.id) - 1: point for point in self._sweep.points}
        for trial in self._study.get_trials(deepcopy=False):
            if trial.state.is_finished():
                continue
            point = points.get(trial.number)
            if point is None:
                self._study.tell(trial.number, state=self._optuna.trial.TrialState.FAIL)
            elif not point.open:
                self.ended(point)

    def next(self) -> Point | None:
        """A point that is open, else a new one, up to as many as were asked for."""
        if self._left:
            return self._left.pop(0)
        tries = 0
        while len(self._sweep.points) < self._search["points"] and tries < MOST_REPEATS:
            number, setting = self._propose()
            if self._is_known(number, setting):
                tries += 1
                continue
            point = self._point(number, setting)
            self._sweep.points.append(point)
            if point.open:
                return point
            self.ended(point)
        return None

    def _propose(self) -> tuple[int, Setting]:
        """What Optuna wants to be tried, and the trial's number."""
        trial = self._study.ask()
        setting: Setting = {}
        for key, texts in self._search["choices"].items():
            setting[key] = trial.suggest_categorical(key, texts)
        for key, (low, high, whole) in self._search["spans"].items():
            log = Interval(low, high, whole).log
            if whole:
                setting[key] = str(trial.suggest_int(key, int(low), int(high), log=log))
            else:
                setting[key] = _text(trial.suggest_float(key, low, high, log=log), False)
        return trial.number, setting

    def _is_known(self, number: int, setting: Setting) -> bool:
        """Whether a setting was tried before: its loss, once it has one, counts for both."""
        items = overrides_of(self._spec, setting)
        count = clients_of(self._spec, setting, self._default)
        points = self._sweep.points
        like = next((p for p in points if (p.overrides, p.clients) == (items, count)), None)
        if like is None:
            return False
        losses = [loss for round_, loss in _losses(like) if round_ > 0]
        if like.status == FINISHED and losses:
            self._study.tell(number, losses[-1])
        else:
            self._study.tell(number, state=self._optuna.trial.TrialState.FAIL)
        return True

    def _point(self, number: int, setting: Setting) -> Point:
        count = clients_of(self._spec, setting, self._default)
        try:
            config = load_setting(self._spec, setting)
            point = make_point(number + 1, self._spec, setting, config, count, self._sweep.keys)
            checked(config, point, self._sweep.superlink)
        except ValueError as error:  # of keys that may not be together
            return Point(
                id=f"{number + 1:03d}", seed=0, clients=count,
                values={key: typed(key, text) for key, text in setting.items()},
                overrides=overrides_of(self._spec, setting),
                status=CRASHED, error=str(error),
            )  # fmt: skip
        return point

    def hopeless(self, task: Task) -> bool:
        """Whether the pruner gives the run up, by its held-out losses so far."""
        point = task.point
        if not (self._reported.get(point.id, 0) < task.rounds < point.rounds):
            return False
        self._reported[point.id] = task.rounds
        trial = self._report(point)
        return trial is not None and bool(trial.should_prune())

    def _report(self, point: Point) -> Any:
        """Make the losses of a point known, with which others are compared; returns its trial."""
        number = int(point.id) - 1
        for found in self._study.get_trials(deepcopy=False):
            if found.number == number and not found.state.is_finished():
                trial = self._optuna.trial.Trial(self._study, found._trial_id)
                for round_, loss in _losses(point):
                    if round_ > 0 and round_ not in found.intermediate_values:
                        trial.report(loss, round_)
                return trial
        return None

    def ended(self, point: Point) -> None:
        """Tell the study how a point ended; one that was stopped goes on later."""
        if point.open:
            return
        self._report(point)
        states = self._optuna.trial.TrialState
        losses = [loss for number, loss in _losses(point) if number > 0]
        number = int(point.id) - 1
        if point.status == FINISHED and losses:
            self._study.tell(number, losses[-1], skip_if_finished=True)
        else:
            state = states.PRUNED if point.status == PRUNED else states.FAIL
            self._study.tell(number, state=state, skip_if_finished=True)


def _losses(point: Point) -> list[tuple[int, float]]:
    """Rounds and held-out losses of a run so far; none if its folder is not here."""
    if not point.run:
        return []
    try:
        rounds = read_history(Path(point.run)).rounds
    except (ValueError, OSError):
        return []
    found = [(record["round"], (record.get("evaluate") or {}).get("loss")) for record in rounds]
    return [(number, loss) for number, loss in found if loss is not None]
