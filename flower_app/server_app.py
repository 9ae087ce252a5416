"""The ServerApp: holds the trunk, serves the data plane, and runs the SplitFed strategy."""

from __future__ import annotations

import logging
from dataclasses import asdict
from functools import partial
from pathlib import Path

from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp

from conf.load import load_config
from conf.schema import Config
from flower_app.build import (
    build_trunk,
    client_form,
    describe,
    describe_start,
    resolve_model,
    set_threads,
)
from flower_app.central import evaluates_centrally
from flower_app.check import check_extras, check_names
from flower_app.ending import leave
from flower_app.logs import mark_lines
from flower_app.metrics.of_run import Metrics, metrics_of
from flower_app.runs.keeper import Keeper
from flower_app.runs.recorder import Recorder
from flower_app.runs.resume import Point, take_up
from models import Part, adapted_shares
from strategies.engine.engine import TrunkEngine
from strategies.rounds.splitfed import SplitFed
from strategies.transport.messages import Lockstep
from strategies.transport.plane import Plane
from strategies.transport.stream.service import TrunkService

logger = logging.getLogger(__name__)

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the experiment that the run config names, or go on with the run it says to resume."""
    mark_lines()
    run, point = context.run_config, None
    if resume := str(run.get("resume", "")):
        point = take_up(resume, str(run["overrides"]))
        config = point.config
    else:
        config = resolve_model(load_config(str(run["experiment"]), str(run["overrides"])))
    check_names(config)
    check_extras(config)
    recorder = Recorder(config, point=point)
    recorder.start()
    try:
        model_folder = run_experiment(config, grid, recorder, point)
    except BaseException as error:
        recorder.fail(error)
        raise
    recorder.finish(model_folder)


def run_experiment(
    config: Config,
    grid: Grid,
    recorder: Recorder,
    point: Point | None = None,
    serve: type[TrunkService] | None = None,
) -> Path | None:
    """Build the trunk, train it with the clients, and save what was trained.

    Parameters
    ----------
    config : Config
        The run's.
    grid : Grid
        Flower's.
    recorder : Recorder
        Started.
    point : Point, optional
        Where a run that was stopped goes on.
    serve : type, optional
        Serves streams in place of `TrunkService`: for runs that are disturbed on purpose.

    Returns
    -------
    Path or None
        Folder of the final model; None if `output.save_model` is off, or each client has its own.
    """
    with metrics_of(config, recorder) as metrics:
        return _run_experiment(config, grid, recorder, point, serve, metrics)


def _run_experiment(
    config: Config,
    grid: Grid,
    recorder: Recorder,
    point: Point | None,
    serve: type[TrunkService] | None,
    metrics: Metrics,
) -> Path | None:
    set_threads(config.runtime.trunk_threads)
    trunk = build_trunk(config)
    if note := describe_start(config):
        recorder.say(note)
    model, shares = describe(trunk), adapted_shares(trunk, asdict(config.tuning), config.lora)
    recorder.built(model, shares)
    engine, plane = _serving(config, trunk, serve, metrics)
    strategy = SplitFed(
        engine,
        plane,
        config,
        metrics.observer,
        form=partial(client_form, config),
        model=model,
        keep=Keeper(config, recorder),
        central=evaluates_centrally(config, engine),
    )
    if point is not None:
        _load(strategy, point, recorder)
    plane.on_step = strategy.on_step
    plane.start()
    try:
        recorder.take_up()
        strategy.start(
            grid=grid,
            initial_arrays=ArrayRecord(),
            num_rounds=config.train.rounds,
            timeout=config.federation.round_timeout,
        )
    finally:
        plane.stop()
    return leave(config, grid, strategy, recorder)


def _serving(
    config: Config, trunk: Part, serve: type[TrunkService] | None, metrics: Metrics
) -> tuple[TrunkEngine, Plane]:
    """The trunk's engine, and the plane by which clients reach it."""
    kind: type[Lockstep | TrunkService] = serve or TrunkService
    if config.link.transport == "messages":
        kind = Lockstep
    limits = kind.limits(config)
    engine = TrunkEngine(
        trunk,
        hidden_size=trunk.hidden_size,
        train=config.train,
        seed=config.seed,
        timeout=limits.turn,
        max_graphs=limits.graphs,
        max_sequences=config.train.batch_size,
        max_tokens=config.data.context,
        max_in_flight=int(config.link.max_in_flight_mb * 2**20),
        meter=metrics.meter,
    )
    metrics.attach(engine)
    return engine, kind(engine, config.link)


def _load(strategy: SplitFed, point: Point, recorder: Recorder) -> None:
    for note in point.notes:
        logger.warning("%s", note)
    try:
        strategy.resume(point.number, point.state, point.clients)
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"round {point.number} of {point.run} does not fit this run's model: {error}. Has "
            "model.path changed since?"
        ) from error
