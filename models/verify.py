"""Compare a split model with the unsplit one: logits and every gradient, padded and not.

Legend: B batch, T tokens, V vocabulary (or labels).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from models.anatomy import ask_for_logits, share_copy
from models.cut import Cut
from models.parts import Parts, split_unchecked
from models.tiny import SIZES, roughen, tiny_config

TOLERANCE = 1e-5
PADDINGS = ("none", "left", "right")


@dataclass(frozen=True)
class Difference:
    """Largest absolute differences; infinite if a gradient exists on one side only."""

    logits: float
    gradient: float
    parameter: str
    """Where the largest difference of gradients is."""

    def within(self, tolerance: float = TOLERANCE) -> bool:
        """Return whether nothing differs by more than `tolerance`; NaN differs."""
        return self.logits <= tolerance and self.gradient <= tolerance


def example(
    config: PretrainedConfig, padding: str, *, batch: int = 2, tokens: int = 12, seed: int = 0
) -> tuple[Tensor, Tensor | None]:
    """Return random ids (B, T) and their mask (B, T), None for padding ``none``.

    Row r has r + 2 pads; padded positions hold the pad token, as a tokenizer would leave them, and
    no other position does.
    """
    text = config.get_text_config(decoder=True)
    generator = torch.Generator().manual_seed(seed)
    ids_BT = torch.randint(0, text.vocab_size, (batch, tokens), generator=generator)
    pad = getattr(text, "pad_token_id", None)
    if isinstance(pad, int) and 0 <= pad < text.vocab_size:
        ids_BT = ids_BT.masked_fill(ids_BT == pad, (pad + 1) % text.vocab_size)
    if padding == "none":
        return ids_BT, None
    mask_BT = torch.ones_like(ids_BT)
    for row in range(1, batch):
        pads = slice(0, row + 2) if padding == "left" else slice(tokens - row - 2, tokens)
        mask_BT[row, pads] = 0
    fill = pad if isinstance(pad, int) and pad >= 0 else 0
    return ids_BT.masked_fill(mask_BT == 0, fill), mask_BT


def compare(
    model: PreTrainedModel, parts: Iterable[Any], ids_BT: Tensor, mask_BT: Tensor | None
) -> Difference:
    """Run `model` and `parts` on one batch and return their largest differences.

    Gradients are of the mean squared logits at real tokens; those of `model` are cleared.

    Parameters
    ----------
    model : PreTrainedModel
        Whose parameters `parts` share.
    parts : iterable of three callables
        Each takes its input and the mask.
    """
    model.zero_grad(set_to_none=True)
    whole = _logits(model, ids_BT, mask_BT)
    want = _gradients(model, whole, mask_BT)
    x = ids_BT
    for part in parts:
        x = part(x, mask_BT)
    got = _gradients(model, x, mask_BT)
    logits = _largest(whole, x, mask_BT)
    worst, where = 0.0, ""
    for name in want.keys() | got.keys():
        both = name in want and name in got
        gap = _largest(want[name], got[name]) if both else math.inf
        if not gap <= worst:
            worst, where = gap, name
    return Difference(logits, worst, where)


def check_forward(model: PreTrainedModel, parts: Parts) -> None:
    """Refuse a split whose logits differ from the model's own; weights and modes stay as they are.

    Raises
    ------
    ValueError
        If any logit differs, padded or not.
    """
    modes = [(m, m.training) for p in (model, *parts) for m in p.modules()]
    device = next(model.parameters()).device
    try:
        for module in (model, *parts):
            module.eval()
        for padding in PADDINGS:
            ids_BT, mask_BT = example(model.config, padding)
            ids_BT = ids_BT.to(device)
            mask_BT = None if mask_BT is None else mask_BT.to(device)
            with torch.no_grad():
                whole = _own_logits(model, ids_BT, mask_BT)
                h = parts.trunk(parts.bottom(ids_BT, mask_BT), mask_BT)
                gap = _largest(whole, parts.top(h, mask_BT), mask_BT)
            scale = max(1.0, float(whole.float().abs().max()))
            if not gap <= TOLERANCE * scale * (1 if whole.dtype == torch.float32 else 1e3):
                raise _inexact(model.config, f"logits differ by {gap:.3g} (padding {padding})")
    finally:
        for module, mode in modes:
            module.training = mode


def check_twin(
    config: PretrainedConfig, cut: Cut, kind: type[PreTrainedModel] | None = None
) -> None:
    """Split a tiny random model of the same structure; refuse the config if it is not exact.

    The twin keeps the number of blocks, their types and the cut; only sizes shrink. If it cannot
    be built so, a default tiny model of the family stands for it. It is of the class `kind`, by
    default the family's causal LM.

    Raises
    ------
    ValueError
        If no twin can be built, or if logits or gradients differ.
    """
    twin, cut = _build_twin(config, cut, kind)
    twin.eval()
    parts = split_unchecked(twin, cut)
    for padding in PADDINGS:
        ids_BT, mask_BT = example(twin.config, padding)
        gap = compare(twin, parts, ids_BT, mask_BT)
        if not gap.within():
            raise _inexact(
                config,
                f"on a tiny model of it logits differ by {gap.logits:.3g}, the gradient of "
                f"{gap.parameter or 'every parameter'} by {gap.gradient:.3g} (padding {padding})",
            )


def _build_twin(
    config: PretrainedConfig, cut: Cut, kind: type[PreTrainedModel] | None
) -> tuple[PreTrainedModel, Cut]:
    build = AutoModelForCausalLM.from_config if kind is None else kind._from_config
    shrunk = {k: v for k, v in SIZES.items() if k != "num_hidden_layers"}
    own = config.to_dict()  # asked for a value that differs by layer, some configs raise
    alias = config.attribute_map
    values = {k: v for k, v in shrunk.items() if isinstance(own.get(alias.get(k, k)), int)}
    why = ""
    for attempt in ("same", "default"):
        try:
            if attempt == "same":
                small = type(config).from_dict({**copy.deepcopy(config.to_dict()), **values})
            else:
                small, cut = tiny_config(config.model_type), Cut(1, 1)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                twin = build(small, attn_implementation="eager")
                roughen(twin).eval()
                with torch.no_grad():
                    _logits(twin, *example(small, "none"))
            return twin, cut
        except Exception as error:  # noqa: BLE001 - configs and models raise what they like
            why = str(error)
    raise ValueError(
        f"{config.model_type} cannot be checked: no tiny model of it can be built ({why}); "
        "it is not split"
    )


def _logits(model: PreTrainedModel, ids_BT: Tensor, mask_BT: Tensor | None) -> Tensor:
    plain = ask_for_logits(share_copy(model))  # the same weights
    return plain(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits


def _own_logits(model: PreTrainedModel, ids_BT: Tensor, mask_BT: Tensor | None) -> Tensor:
    try:
        return _logits(model, ids_BT, mask_BT)
    except Exception as error:  # whatever a model's own code may raise
        raise ValueError(
            f"{type(model).__name__} cannot be split: it does not run on ids (B, T) and their mask "
            f"({error})"
        ) from error


def _real(logits: Tensor, mask_BT: Tensor | None) -> Tensor:
    """The logits of tokens that are not padding; all of them if there is one row for a text."""
    return logits if mask_BT is None or logits.dim() == 2 else logits[mask_BT.bool()]


def _gradients(model: PreTrainedModel, logits: Tensor, mask_BT: Tensor | None) -> dict[str, Tensor]:
    keep = _real(logits, mask_BT)
    keep.float().square().mean().backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def _largest(a: Tensor, b: Tensor, mask_BT: Tensor | None = None) -> float:
    if a.shape != b.shape:
        return math.inf
    a, b = _real(a, mask_BT), _real(b, mask_BT)
    gap = (a.detach().float() - b.detach().float()).abs()
    return math.inf if bool(torch.isnan(gap).any()) else float(gap.max()) if gap.numel() else 0.0


def _inexact(config: PretrainedConfig, how: str) -> ValueError:
    return ValueError(f"{config.model_type} cannot be split: the split is not exact, {how}")
