"""Split a model, and make sure that its parts are the model."""

from __future__ import annotations

from transformers import PreTrainedModel

from models.cut import Cut
from models.families import require_tested
from models.heads import require_tested_class
from models.parts import Parts, split_unchecked
from models.verify import check_forward, check_twin


def split(model: PreTrainedModel, cut: Cut, *, allow_untested: bool = False) -> Parts:
    """Split a model into three parts that share its parameters.

    Parameters
    ----------
    model : PreTrainedModel
        Of a tested family and class: its causal LM, or one of `models.heads`. It is left as it is.
    cut : Cut
    allow_untested : bool
        Split what is not in the tested tables, after comparing the split with the model itself
        (logits) and with a tiny model of its class and config (logits and every gradient).

    Returns
    -------
    Parts

    Raises
    ------
    ValueError
        If the cut leaves no trunk, or the model is untested or cannot be split.
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"{type(model).__name__} cannot be split: it is no model of transformers itself; take "
            "the one inside it (of a PEFT model: model.merge_and_unload())"
        )
    tested = require_tested(model.config, allow_untested)
    tested = require_tested_class(model, allow_untested) and tested
    parts = split_unchecked(model, cut)
    if not tested:
        check_forward(model, parts)
        check_twin(model.config, cut, type(model))
    return parts
