"""Graft's configuration: frozen, keyword-only dataclasses that check themselves.

One `Config` reproduces a run. `conf.load` builds it from YAML and overrides; every section refuses
a wrong value in `__post_init__`, with the values and the remedy. What spans sections is refused by
`Config.check`, so that a bare `Config()` can be built.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from conf import combinations, rules
from conf.rules import ConfigError, setting
from conf.sections.aggregation import AggregationConfig
from conf.sections.cut import CutConfig
from conf.sections.data import DataConfig
from conf.sections.federation import FederationConfig
from conf.sections.link import LinkConfig
from conf.sections.lora import LoraSettings
from conf.sections.model import ModelConfig
from conf.sections.output import OutputConfig
from conf.sections.privacy import PrivacyConfig
from conf.sections.runtime import RuntimeConfig
from conf.sections.tracking import TrackingConfig
from conf.sections.train import TrainConfig
from conf.sections.tuning import TuningConfig

__all__ = [
    "AggregationConfig",
    "Config",
    "CutConfig",
    "DataConfig",
    "FederationConfig",
    "LinkConfig",
    "LoraSettings",
    "ModelConfig",
    "OutputConfig",
    "PrivacyConfig",
    "RuntimeConfig",
    "TrackingConfig",
    "TrainConfig",
    "TuningConfig",
]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that defines a run."""

    experiment: str = setting("demo", rules.NOT_EMPTY)
    """Name of the experiment; set by `load_config`."""
    seed: int = setting(0, rules.SEED)
    """Seeds weights, partitions, held-out splits and the order of the examples."""
    model: ModelConfig = field(default_factory=ModelConfig)
    cut: CutConfig = field(default_factory=CutConfig)
    tuning: TuningConfig = field(default_factory=TuningConfig)
    lora: LoraSettings = field(default_factory=LoraSettings)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    federation: FederationConfig = field(default_factory=FederationConfig)
    aggregation: AggregationConfig = field(default_factory=AggregationConfig)
    link: LinkConfig = field(default_factory=LinkConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name in ("experiment", "seed"):
                value = rules.checked(value, str(item.type), item.metadata["rule"], item.name)
                object.__setattr__(self, item.name, value)
            elif type(value).__name__ != item.type:
                raise ConfigError(f"{item.name} must be a {item.type}, got {value!r}")

    def check(self) -> Config:
        """Refuse what no section can refuse alone, and return self.

        Raises
        ------
        ConfigError
            If no model is named, its position table is shorter than `data.context`, nothing would
            be trained, or what is trained could not be averaged as wanted.
        """
        combinations.check_model(self.model, self.data)
        combinations.check_trained(self.model, self.cut, self.tuning)
        combinations.check_aggregated(self.aggregation, self.model, self.train, self.tuning)
        combinations.check_ends(self.aggregation, self.train, self.data, self.output)
        combinations.check_masked(self.privacy, self.aggregation, self.train, self.data)
        combinations.check_noisy_updates(self.privacy, self.aggregation, self.train, self.tuning)
        combinations.check_nopeek(self.privacy, self.cut, self.tuning)
        combinations.check_bridge(self.aggregation, self.train)
        combinations.check_cache(self.link, self.tuning)
        combinations.check_watched(self.train, self.output, self.data, self.federation)
        return self
