"""What a run leaves when all rounds are done: one model, or each site's own and what is common."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from flwr.serverapp import Grid
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from conf.schema import Config
from flower_app.data.text import load_tokenizer
from flower_app.export import export_model
from flower_app.runs import checkpoint
from flower_app.runs.folders import COMMON, MASKED, folders
from flower_app.runs.recorder import Recorder
from models.bridge import save_bridge, take_bridge
from strategies.records import to_arrays
from strategies.rounds.answers import Profile
from strategies.rounds.local import ask_to_export
from strategies.rounds.roster import Roster
from strategies.rounds.splitfed import SplitFed

logger = logging.getLogger(__name__)


def leave(config: Config, grid: Grid, strategy: SplitFed, recorder: Recorder) -> Path | None:
    """Save what was trained, of the last round or the best (`output.model`).

    Returns
    -------
    Path or None
        The model's folder; None if `output.save_model` is off, or each client has its own.

    Raises
    ------
    RuntimeError
        If the model cannot be exported; where its tensors are instead, or why nowhere.
    """
    if not config.output.save_model:
        return None
    number = _go_to_best(strategy, recorder) if config.output.model == "best" else strategy.done
    recorder.note(model_round=number)
    state, folder = strategy.joint.tensors(), recorder.folder
    if config.privacy.ends == "masked":
        _save_masked(strategy, recorder)
        return None
    if strategy.local is None:
        return _save(config, state, folder)
    _write(state, folder / COMMON)
    arrays = to_arrays(state) if config.output.share_trunk else strategy.joint.arrays_for()
    there = _present(strategy.roster, grid)
    failed = ask_to_export(grid, config, there, strategy.local, arrays, number)
    for client, why in sorted(failed.items()):
        logger.warning("%s has not saved its own ends: %s", client, why)
    recorder.say(
        f"each client has its own ends (aggregation.ends={config.aggregation.ends}), saved at its "
        f"site; what is common is in {folder / COMMON}"
    )
    return None


def _save_masked(strategy: SplitFed, recorder: Recorder) -> None:
    """Save what the server has: the trunk, and a sum of ends that it cannot read."""
    folder, masked = recorder.folder, strategy.joint.masked
    _write(strategy.joint.tensors(), folder / COMMON)
    if masked is not None:
        _write(masked.state_dict(), folder / MASKED)
    recorder.say(
        f"the ends are masked (privacy.ends=masked), in {folder / MASKED}: a site puts the model "
        f"together with `graft unmask {folder} --site-key FILE --to DIR`"
    )


def _present(roster: Roster, grid: Grid) -> list[Profile]:
    """Who is there to save its own ends: the run is complete, so fewer than it needed will do."""
    try:
        return roster.gather(grid)
    except RuntimeError as error:
        logger.warning("not all clients are there at the end: %s", error)
        roster.meet(grid, sorted(grid.get_node_ids()))
        return roster.here


def _go_to_best(strategy: SplitFed, recorder: Recorder) -> int:
    """Bring the strategy back to its best round, if that was kept; returns its round then."""
    best = strategy.losses.best
    if best is None or best == strategy.done:
        return strategy.done
    try:
        there = dict(folders(recorder.folder))
        if best not in there:
            raise ValueError(f"there is no checkpoint of it in {recorder.folder}")
        strategy.resume(best, checkpoint.read(there[best]).state)
    except (ValueError, OSError) as error:
        logger.warning(
            "output.model=best is round %d, and cannot be saved: %s. The model saved is that of "
            "round %d",
            best, error, strategy.done,
        )  # fmt: skip
    return strategy.done


def _save(config: Config, state: Mapping[str, Tensor], folder: Path) -> Path:
    """Export what was trained, the bridge beside it; if that fails, keep the tensors themselves."""
    bridge, _ = take_bridge(state)
    try:
        path = export_model(config, state, load_tokenizer(config.model), folder / "model")
        if bridge:
            save_bridge(bridge, path)
        return path
    except (ValueError, OSError, RuntimeError, SafetensorError) as error:
        rescue = folder / "trained.safetensors"
        try:
            _write(state, rescue)
        except (OSError, SafetensorError) as again:
            raise RuntimeError(
                f"the run is complete, but neither its model could be exported ({error}) nor its "
                f"tensors saved ({again}); free space, and `graft resume {folder}` saves the model "
                "from the last checkpoint, if there is one"
            ) from error
        raise RuntimeError(
            f"the run is complete, but its model could not be exported: {error}. The trained "
            f"tensors of all parts are in {rescue}"
        ) from error


def _write(state: Mapping[str, Tensor], path: Path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
