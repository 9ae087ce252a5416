"""What is exported, and what is known of it: a run's model, one of its checkpoints, any model."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from conf.load import load_config
from conf.schema import Config
from flower_app.build import build_trunk
from flower_app.data.tokenizer import load_tokenizer
from flower_app.export import export_model
from flower_app.runs import checkpoint
from flower_app.runs.checkpoint import Checkpoint
from flower_app.runs.folders import CHECKPOINTS, folders, model_of, read_summary
from flower_app.runs.history import read_history
from flower_app.runs.resume import config_of
from flower_app.runs.summary import summarize
from flower_app.serving.source import Served, find_run_folder, find_served, serve_model
from models import Cut
from models.bridge import save_bridge, take_bridge
from strategies.aggregate.joint import JointModel
from strategies.engine.engine import TrunkEngine


@dataclass(frozen=True, kw_only=True)
class Origin:
    """A model that is exported, with what its card tells."""

    served: Served
    config: Config | None = None
    """Of its run, if it is a run's."""
    round: int | None = None
    """Of that run, whose model it is."""
    told: dict[str, Any] = field(default_factory=dict)
    """As the run's summary has it, up to that round."""


def find_origin(text: str, *, number: int | None, cut: Cut | None, scratch: Path) -> Origin:
    """Find what to export; a checkpoint is made a model of first.

    Parameters
    ----------
    text : str
        As for `flower_app.serving.source.find_served`, or a checkpoint of a run.
    number : int, optional
        The round of a run; None: what the run left, of an unfinished one the newest checkpoint.
    cut : Cut, optional
        Needed for what is no run's.
    scratch : Path
        A folder for the model of a checkpoint.

    Raises
    ------
    ValueError
        If there is no such thing, or the run's clients have ends of their own.
    """
    place = Path(text).expanduser().absolute()
    if place.parent.name == CHECKPOINTS and place.is_dir():
        named = {path: each for each, path in folders(place.parents[1])}
        if place not in named:
            raise ValueError(f"{place} is no checkpoint: its name is not round- and a number")
        return find_origin(str(place.parents[1]), number=named[place], cut=cut, scratch=scratch)
    run = find_run_folder(text)
    if run is None:
        if number is not None:
            raise ValueError(f"{text} is no run and has no rounds: leave --round out")
        return Origin(served=find_served(text, cut))
    summary, model = read_summary(run) or {}, model_of(run)
    if model is not None and number in (None, summary.get("model_round")):
        served = find_served(str(run), cut)
        config = load_config(str(run / "config.yaml"))
        return _told(run, served, config, summary.get("model_round", summary.get("rounds")))
    found = _checkpoint(run, number)
    config, _ = config_of(found)
    state, model = trained(found, config), scratch / "model"
    export_model(config, state, load_tokenizer(config.model), model)
    if bridge := take_bridge(state)[0]:
        save_bridge(bridge, model)
    served = serve_model(run, model, config, cut)
    return _told(run, served, config, found.facts.round)


def trained(found: Checkpoint, config: Config) -> dict[str, Tensor]:
    """All that was trained up to a checkpoint, by name in the whole model.

    Raises
    ------
    ValueError
        If the ends of its run are the clients' own, or it does not fit the model.
    """
    if config.privacy.ends != "plain":
        raise ValueError(
            f"{found.folder} holds no model that can be read: its ends are masked (privacy.ends="
            f"{config.privacy.ends}). Once the run has ended, a site takes `graft unmask "
            f"{found.folder.parents[1]} --site-key FILE --to DIR`"
        )
    if config.aggregation.ends != "average":
        raise ValueError(
            f"{found.folder} holds no whole model: each client has its own ends "
            f"(aggregation.ends={config.aggregation.ends}), which are at its site"
        )
    trunk = build_trunk(config)
    engine = TrunkEngine(trunk, hidden_size=trunk.hidden_size, train=config.train, seed=config.seed)
    joint = JointModel(engine, config)
    try:
        engine.load_state_dict(found.state["engine"])
        joint.load_state_dict(found.state["joint"])
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"{found.folder} does not fit its run's model: {error}. Has {config.model.path} "
            "changed since?"
        ) from error
    return joint.tensors()


def _checkpoint(run: Path, number: int | None) -> Checkpoint:
    there = dict(folders(run))
    wanted = max(there, default=None) if number is None else number
    if wanted not in there:
        rounds = ", ".join(map(str, there)) or "none"
        raise ValueError(
            f"{run} has no checkpoint of round {number}: it has {rounds} "
            "(output.checkpoint_every, output.keep_checkpoints)"
            if number is not None
            else f"{run} has neither a model nor a checkpoint: there is nothing to export"
        )
    return checkpoint.read(there[wanted])


def _told(run: Path, served: Served, config: Config, number: int | None) -> Origin:
    history = read_history(run)
    rounds = [each for each in history.rounds if number is None or each["round"] <= number]
    told = summarize(config, rounds, rounds[-1].get("seconds", 0.0) if rounds else 0.0)
    return Origin(served=served, config=config, round=number, told=told)
