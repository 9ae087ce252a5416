"""The models that claims of equality are tried on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from models import Cut, build_scratch
from models.tiny import roughen, tiny_config
from models.whole import has_sdpa, load_whole
from simulations.equality.parity import count_blocks

LARGE = 20_000_000
"""Parameters from which a model is trained with LoRA and in fewer steps."""


@dataclass(frozen=True)
class Subject:
    """A model that claims are tried on."""

    name: str
    model: PreTrainedModel
    """Untuned, without dropout; nothing changes it."""
    folder: Path
    """The same as a checkpoint."""
    tokenizer: str
    large: bool = False
    allow_untested: bool = False

    @property
    def steps(self) -> int:
        """Optimizer steps of a round of merged training; other claims take fewer."""
        return 2 if self.large else 10

    @property
    def cut(self) -> Cut:
        """The smallest ends that have a block each."""
        return Cut(1, 1) if count_blocks(self.model) > 2 else Cut(0, 0)


def tiny(family: str, attention: str, scratch: Path) -> Subject:
    """A random model of four blocks that embeds bytes; GPT-2's embedding is tied."""
    config = tiny_config(family, vocab_size=259)
    how = attention if attention != "both" else "sdpa" if has_sdpa(config) else "eager"
    model = roughen(build_scratch(config, 0, attention=how)).eval()
    tied = bool(getattr(config, "tie_word_embeddings", False))
    name = f"tiny {family}" + (", tied" if tied else "")
    return Subject(name, model, _saved(model, scratch / family), "bytes")


def checkpoint(path: str, attention: str, allow_untested: bool, scratch: Path) -> Subject:
    """A checkpoint with its dropout taken out: draws are no part of what is compared."""
    how = "sdpa" if attention == "both" else attention
    try:
        model = load_whole(path, attention=how)
    except ValueError:
        if attention != "both":
            raise
        model = load_whole(path, attention="eager")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    text = model.config.get_text_config(decoder=True)
    for name, value in text.to_dict().items():
        if isinstance(value, float) and (name.endswith("pdrop") or "dropout" in name):
            setattr(text, name, 0.0)
    large = sum(parameter.numel() for parameter in model.parameters()) >= LARGE
    name = Path(path).stem if path.endswith(".gguf") else Path(path).name
    folder = _saved(model, scratch / "model")
    return Subject(name, model.eval(), folder, path, large, allow_untested)


def _saved(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder
