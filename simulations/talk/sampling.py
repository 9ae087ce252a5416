"""How an answer is drawn: checked in words, and as `transformers` takes it."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig, PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the tokens of an answer are drawn."""

    max_tokens: int = 256
    """New tokens at most."""
    temperature: float = 1.0
    """0: always the likeliest token."""
    top_p: float = 1.0
    """Only the likeliest tokens that make up this much."""
    top_k: int = 0
    """Only this many of the likeliest tokens; 0: all."""
    repetition_penalty: float = 1.0
    seed: int | None = None
    """The same seed gives the same answer; None: another each time."""
    stop: tuple[str, ...] = ()
    """An answer ends before the first of these."""

    def __post_init__(self) -> None:
        _check("max_tokens", self.max_tokens, self.max_tokens >= 1, "1 or more")
        _check("temperature", self.temperature, 0 <= self.temperature <= 100, "from 0 to 100")
        _check("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1")
        _check("top_k", self.top_k, self.top_k >= 0, "0 (all tokens) or more")
        good = 0 < self.repetition_penalty < math.inf
        _check("repetition_penalty", self.repetition_penalty, good, "above 0; 1 penalizes nothing")
        good = self.seed is None or 0 <= self.seed < 2**63
        _check("seed", self.seed, good, "from 0 to 2^63 - 1, or left out")
        _check("stop", self.stop, all(self.stop), "texts of one character or more")

    @property
    def greedy(self) -> bool:
        """Whether always the likeliest token is taken."""
        return self.temperature == 0

    def configure(self, model: PreTrainedModel, eos: Iterable[int], pad: int) -> GenerationConfig:
        """Return the model's own generation settings with these over them, for one answer."""
        config = copy.deepcopy(model.generation_config)
        drawn: dict[str, Any] = _GREEDY
        if not self.greedy:
            drawn = {
                "do_sample": True,
                "temperature": self.temperature,
                "top_p": self.top_p,
                "top_k": self.top_k,
            }
        config.update(
            **drawn,
            repetition_penalty=self.repetition_penalty,
            max_new_tokens=self.max_tokens,
            max_length=None,
            num_beams=1,
            num_return_sequences=1,
            use_cache=True,
            return_dict_in_generate=True,
            output_scores=False,
            output_logits=False,
            eos_token_id=sorted(eos) or None,
            pad_token_id=pad,
        )
        return config


_GREEDY = {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50, "min_p": None}
"""What `transformers` has where nothing is drawn; it warns of anything else."""


def defaults(model: PreTrainedModel) -> Sampling:
    """Return the settings that the model itself brings along."""
    own, found = model.generation_config, {}
    for name in ("temperature", "top_p", "top_k", "repetition_penalty"):
        if getattr(own, name, None) is not None:
            found[name] = getattr(own, name)
    return Sampling(**found)


def _check(name: str, value: object, good: bool, wanted: str) -> None:
    if not good:
        raise ValueError(f"{name}={value!r}: must be {wanted}")
