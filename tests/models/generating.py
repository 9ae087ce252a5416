"""How a family generates with its trunk elsewhere, tried on a tiny model of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from models import Cut
from models.parts import split_unchecked
from models.remote import join_remote
from strategies.generation.engine import GenerationEngine
from strategies.generation.local import LocalTrunk
from strategies.generation.memory import Limits

Inputs = dict[str, Any]


def inputs(model: PreTrainedModel) -> dict[str, Inputs]:
    """One text, three with padding on the left, one that repeats itself."""
    text = model.config.get_text_config(decoder=True)
    generator = torch.Generator().manual_seed(1)
    ids_BT = torch.randint(3, text.vocab_size - 1, (3, 9), generator=generator)
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[0, :4] = 0
    padded_BT = ids_BT.masked_fill(mask_BT == 0, getattr(text, "pad_token_id", None) or 0)
    twice_BT = ids_BT[1:2, :6].repeat(1, 3)
    return {
        "one": {"input_ids": ids_BT[1:2], "attention_mask": mask_BT[1:2]},
        "padded": {"input_ids": padded_BT, "attention_mask": mask_BT},
        "twice": {"input_ids": twice_BT, "attention_mask": torch.ones_like(twice_BT)},
    }


MODES: dict[str, tuple[str, Inputs]] = {
    "greedy": ("one", {}),
    "padded": ("padded", {}),
    "beams": ("padded", {"num_beams": 3}),
    "look-up": ("twice", {"prompt_lookup_num_tokens": 3}),
}


def generates(model: PreTrainedModel) -> str:
    """Compare with the whole model, token for token, and say how it went.

    ``WRONG`` begins what must not be. What the whole model itself does not do is left out.
    """
    calls = {mode: call(model, mode) for mode in MODES}
    wants = {mode: answer for mode in MODES if (answer := whole(model, calls[mode])) is not None}
    if not wants:
        return "its own does not run"
    try:
        engine = GenerationEngine(split_unchecked(model, Cut(1, 1)).trunk, Limits())
    except ValueError as error:
        return f"refused: {short(error)}"
    wrong, refused, cached = [], [], True
    with torch.no_grad():
        for mode, want in wants.items():
            parts = split_unchecked(model, Cut(1, 1))
            split = join_remote(parts.bottom, parts.top, LocalTrunk(engine))
            try:
                got = split.generate(**calls[mode])
            except ValueError as error:
                refused.append(f"{mode}: {short(error)}")
                continue
            if not torch.equal(got, want):
                wrong.append(mode)
            cached = cached and split.tally.positions < want.numel() * 3
    engine.stop()
    return _verdict(wrong, refused, len(wants), cached, engine.one_by_one)


def call(model: PreTrainedModel, mode: str) -> Inputs:
    which, how = MODES[mode]
    few = {"max_new_tokens": 10, "pad_token_id": 0, "eos_token_id": None, "do_sample": False}
    return {**inputs(model)[which], **how, **few}


def whole(model: PreTrainedModel, asked: Inputs) -> Tensor | None:
    """What the whole model answers; None if it does not."""
    try:
        with torch.no_grad():
            return model.generate(**asked)
    except (ValueError, RuntimeError, AttributeError, TypeError):
        return None


def short(error: Exception) -> str:
    return " ".join(str(error).split()).replace("|", "/")[:110]


def _verdict(wrong: list[str], refused: list[str], own: int, cached: bool, alone: str) -> str:
    if wrong:
        return f"WRONG: {', '.join(wrong)}"
    if len(refused) == own:
        return f"refused: {refused[0].partition(': ')[2]}"
    how = "without a cache" if not cached else "one by one" if alone else "together"
    less = f", no {', '.join(each.partition(':')[0] for each in refused)}" if refused else ""
    return f"yes, {how}{less}"
