"""What is audited: an experiment from its start, or the model that a run of it has left."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import lru_cache

from torch import Tensor
from transformers import PreTrainedModel

from conf.load import from_json, to_json
from conf.schema import Config
from flower_app.build import build_whole, cut_of, resolve_model, start
from models import Parts, client_state, split


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model that is trained, and what it began with."""

    config: Config
    """Of the training that is recorded."""
    origin: Config
    """Of the run; another one where its model is trained further."""

    def with_seed(self, seed: int) -> Subject:
        """The same with another seed."""
        own = replace(self.config, seed=seed)
        return Subject(config=own, origin=own)

    def parts(self) -> Parts:
        """The three parts, tuned, as the recorded training finds them."""
        return _parts(self.config)

    def first(self) -> dict[str, Tensor]:
        """What of the ends is trained, as the run began with it; empty: as `parts` has it."""
        if self.origin == self.config:
            return {}
        parts = _parts(self.origin)
        return {n: t.clone() for n, t in client_state(parts.bottom, parts.top).items()}


def subject_of(config: Config, trained: str = "") -> Subject:
    """What is audited.

    Parameters
    ----------
    config : Config
        Of the experiment or the run.
    trained : str
        Folder of the model or adapter that the run has left; empty: there is none.
    """
    origin = resolve_model(config)
    if not trained:
        return Subject(config=origin, origin=origin)
    tokenizer = config.model.tokenizer
    model = replace(config.model, path=trained, base="", scratch={}, tokenizer=tokenizer)
    return Subject(config=resolve_model(replace(config, model=model)), origin=origin)


def _parts(config: Config) -> Parts:
    # Pretrained weights do not depend on the seed.
    base = config if config.model.scratch else replace(config, seed=0)
    whole = copy.deepcopy(_whole(to_json(base)))
    parts = split(whole, cut_of(config), allow_untested=config.model.allow_untested)
    start(list(parts), config)
    # One device for all: who attacks has what the server and the clients have.
    return Parts(*(part.to(config.runtime.client_device) for part in parts))


@lru_cache(maxsize=1)
def _whole(text: str) -> PreTrainedModel:
    """The base, which takes half a minute to read out of a .gguf file."""
    return build_whole(from_json(text))
