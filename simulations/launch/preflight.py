"""Finds a run's mistakes before Flower is started, which takes its time."""

from __future__ import annotations

from pathlib import Path

from conf.load import load_config
from conf.rules import ConfigError
from conf.schema import Config, DataConfig, ModelConfig
from flower_app.runs.folders import make_parent, runs_folder


def check_run(experiment: str, overrides: str = "") -> Config:
    """Check what a simulated run needs of this machine; a ValueError says what is wrong.

    Parameters
    ----------
    experiment, overrides : str
        The run's configuration.

    Returns
    -------
    Config
        With the folder in place of `last:NAME`.
    """
    config = load_config(experiment, overrides)
    _check_data(config.data)
    make_parent(runs_folder(config.output.folder))

    from flower_app.build import resolve_model  # with torch, so not for a misspelt key
    from models import Cut
    from strategies.engine.policies.registry import find_policy

    find_policy(config.train.strategy)
    config = resolve_model(config)
    blocks = _count_blocks(config.model)
    if blocks is not None:
        Cut(bottom=config.cut.bottom, top=config.cut.top).ranges(blocks)
    return config


def _check_data(data: DataConfig) -> None:
    if data.source != "files":
        return
    if not data.path:
        raise ConfigError(
            "data.source=files needs data.path in a simulation: nodes that bring files of their "
            "own are a deployment's (docs/deployment.md)",
            key="data.path",
        )
    path = Path(data.path).expanduser()
    if not path.is_absolute():
        raise ConfigError(
            f"data.path is the relative path '{data.path}', and Flower does not run the app in "
            f"this folder; give an absolute path, such as {path.absolute()}",
            key="data.path",
        )
    if not path.exists():
        raise ConfigError(f"data.path {path} does not exist", key="data.path")


def _count_blocks(model: ModelConfig) -> int | None:
    """Return the blocks of a model; None if only reading its weights would tell."""
    from models.whole import make_config, read_config

    if model.path.endswith(".gguf"):
        return None
    whole = make_config(model.scratch) if model.scratch else read_config(model.path)
    blocks = getattr(whole.get_text_config(decoder=True), "num_hidden_layers", None)
    return blocks if isinstance(blocks, int) else None
