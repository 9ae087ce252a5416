"""`model`: Which model is split."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from conf.rules import ConfigError, one_of, setting
from conf.sections.base import Section


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Section):
    """Which model is split, and how it is held in memory."""

    section: ClassVar[str] = "model"

    path: str = ""
    """Folder, hub id or .gguf file of a checkpoint; `last:NAME` is the newest run of NAME.

    The folder may be of a PEFT adapter: its base is the one that it names, or `base`.
    """
    base: str = ""
    """Folder or hub id of the model that the adapter at `path` adapts; empty: as it says itself."""
    scratch: dict[str, Any] = field(default_factory=dict)
    """A `transformers` config (with `model_type`) to train from random weights; excludes `path`.

    Its keys are the model's own and are checked when the model is built.
    """
    tokenizer: str = ""
    """Folder, hub id, or `bytes` (one token per UTF-8 byte); empty: the tokenizer beside `path`."""
    dtype: str = setting("fp32", one_of("fp32", "fp16", "bf16"))
    """Type of the weights in memory: fp32, fp16 or bf16."""
    attention: str = setting("sdpa", one_of("sdpa", "eager"))
    """Attention implementation of `transformers`: sdpa or eager."""
    allow_untested: bool = False
    """Split a model family that is not in the tested table."""

    def _check_together(self) -> None:
        if self.path and self.scratch:
            raise ConfigError(
                f"model.path ({self.path!r}) and model.scratch exclude each other: "
                "clear one of them (model.scratch={} or model.path=)",
                key="model.path",
            )
        if self.base and not self.path:
            raise ConfigError(
                f"model.base ({self.base!r}) is the base of the adapter at model.path, which is "
                "not set: set model.path to the adapter's folder, or to the model without a base",
                key="model.base",
            )
        if self.scratch and not isinstance(self.scratch.get("model_type"), str):
            raise ConfigError(
                "model.scratch needs a model_type, such as llama or gpt2; it has "
                f"{', '.join(self.scratch)}",
                key="model.scratch",
            )
        if self.scratch and not self.tokenizer:
            raise ConfigError(
                "model.scratch needs model.tokenizer: `bytes`, or the folder or hub id of one",
                key="model.tokenizer",
            )
