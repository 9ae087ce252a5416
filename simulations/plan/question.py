"""What a plan is asked for: a model or an experiment, and shorthands for keys of its settings."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from conf.load import experiments, load_config
from conf.rules import nearest
from conf.schema import Config
from flower_app.build import LAST
from flower_app.check import check_names
from flower_app.runs.folders import find_last_run
from simulations.plan import units

PLAIN = "lora"
"""The experiment whose other settings a model is planned with."""


@dataclass(frozen=True, kw_only=True)
class Shorthand:
    """Options that stand for keys; empty ones leave the configuration as it is."""

    cut: str = ""
    batch: str = ""
    lora: int = 0
    full: bool = False
    dtype: str = ""
    precision: str = ""
    wire: str = ""

    def overrides(self) -> list[str]:
        """The keys that they set."""
        found = []
        if self.cut:
            own = units.cut(self.cut)
            found += [f"cut.bottom={own.bottom}", f"cut.top={own.top}"]
        if self.batch:
            rows, tokens = units.batch(self.batch)
            found += [f"train.batch_size={rows}", f"data.context={tokens}"]
        if self.lora and self.full:
            raise ValueError(f"--lora {self.lora} and --full exclude each other: give one of them")
        mode = "lora" if self.lora else "full" if self.full else ""
        if mode:
            found += [f"tuning.{role}={mode}" for role in ("bottom", "trunk", "top")]
        found += [f"lora.rank={self.lora}"] if self.lora else []
        keys = {"model.dtype": self.dtype, "train.precision": self.precision}
        keys["link.codec"] = self.wire
        return found + [f"{key}={value}" for key, value in keys.items() if value]


def configure(model: str, short: Shorthand, overrides: list[str]) -> Config:
    """The configuration of an experiment, or of a model with the settings of `PLAIN`.

    Parameters
    ----------
    model : str
        An experiment's name or YAML file; else the folder or hub id of a model.
    short : Shorthand
        Goes over the experiment.
    overrides : list of str
        ``key=value``; go over both.

    Raises
    ------
    ValueError
        If a key or a value is wrong.
    """
    experiment = model in experiments() or Path(model).suffix in (".yaml", ".yml")
    own = [] if experiment else [f"model.path={model}", "model.base="]
    if not experiment and not Path(model).exists() and (near := nearest(model, experiments())):
        raise ValueError(f"{model} is neither an experiment nor the folder of a model{near}")
    config = load_config(model if experiment else PLAIN, [*own, *short.overrides(), *overrides])
    check_names(config)
    if not config.model.path.startswith(LAST):
        return config
    folder = find_last_run(config.model.path.removeprefix(LAST), config.output.folder)
    return replace(config, model=replace(config.model, path=str(folder)))
