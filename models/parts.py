"""Cut a Hugging Face model into bottom, trunk and top without forking its code.

Whether the parts are the model, nobody asks here: `models.checked` does.

Legend: B batch, T tokens, D hidden size, V vocabulary (or labels).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from models import anatomy as anatomy_of
from models.anatomy import Anatomy, ask_for_logits, set_module, share_copy, weight_owners
from models.cached import PartCache, takes
from models.cut import ROLES, Cut
from models.flow import Flow, Skip, Vacant, deliver_hook, halt_hook, run_with, standin
from models.targets import take_inventory


class Part(nn.Module):
    """The bottom, trunk or top of a causal LM; an ordinary module.

    Attributes
    ----------
    role : str
        ``bottom``, ``trunk`` or ``top``.
    cut : Cut
    model : PreTrainedModel
        A copy of the whole model's modules in which all that other parts own is a stand-in
        without weights. Its parameters are the original's.
    blocks : range
        Indices of the owned blocks in the whole model.
    block_list : str
        Name of the block list, ``model.layers`` say.
    num_blocks_total, hidden_size : int
    arity : int
        What a block returns, see `Anatomy.arity`.
    inventory : Inventory
        What may have an adapter, in all blocks of the whole model.
    finds_last : bool
        The head looks for each text's last token, see `Anatomy.finds_last`.
    """

    def __init__(self, model: PreTrainedModel, role: str, cut: Cut, anatomy: Anatomy) -> None:
        super().__init__()
        self.role = role
        self.cut = cut
        self.block_list = anatomy.blocks
        self.arity = anatomy.arity
        self.finds_last = anatomy.finds_last
        self.num_blocks_total = anatomy.num_blocks
        self.blocks = cut.ranges(anatomy.num_blocks)[role]
        self.hidden_size = anatomy_of.width(model)
        self.inventory = take_inventory(model, anatomy)
        self.model = _carve(model, role, self.blocks, anatomy)
        self.config = self.model.config
        self.training = model.training

    @property
    def dtype(self) -> torch.dtype:
        """Type of the base weights; received activations are cast to it."""
        for name, parameter in self.model.named_parameters():
            if parameter.is_floating_point() and "lora_" not in name:
                return parameter.dtype
        return torch.float32

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return next(self.parameters()).device

    def forward(
        self,
        x: Tensor,
        attention_mask: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        cache: PartCache | None = None,
    ) -> Tensor:
        """Run the part.

        Parameters
        ----------
        x : Tensor
            bottom: token ids (B, T), integer. trunk and top: activations (B, T, D).
        attention_mask : Tensor, optional
            (B, T), 1 for tokens and 0 for padding on either side; with a cache (B, L + T). Or what
            attention adds to its scores (B, 1, T, L + T).
        positions : Tensor, optional
            (B, T), integer: where tokens stand in their texts, for models that ask.
        cache : PartCache, optional
            What the part keeps of the L positions before, for generation; it grows by T.

        Returns
        -------
        Tensor
            bottom and trunk: activations (B, T, D). top: logits (B, T, V); (B, V) of a model
            that classifies whole texts.

        Raises
        ------
        ValueError
            If a shape is wrong, or ids and mask do not agree on a text's last token where the
            head looks for it.
        """
        past = cache.length if cache is not None and cache.attends else 0
        self._check(x, attention_mask, past)
        kwargs = {**self._generating(positions, cache), "attention_mask": attention_mask}
        dtype = self.dtype
        flow = Flow(standin(x.shape[0], x.shape[1], self.hidden_size, x, dtype))
        if self.role == "bottom":
            kwargs["input_ids"] = x
        else:
            flow.h_BTD = x.to(dtype)
            if self.role == "top" and self.finds_last:
                kwargs["input_ids"] = self._ids_of_mask(x, attention_mask)
            else:
                kwargs["inputs_embeds"] = flow.standin_BTD
        output = run_with(flow, lambda: self.model(**kwargs))
        if cache is not None:
            cache.grow(*x.shape[:2])
        if self.role == "top":
            return output.logits
        if flow.out_BTD is None:
            raise RuntimeError(f"the {self.role} ran past its last block; this model skips blocks")
        if flow.out_BTD.shape != (*x.shape[:2], self.hidden_size):
            raise ValueError(
                f"{self.config.model_type} cannot be split: its blocks hand on "
                f"{tuple(flow.out_BTD.shape)}, not (B, T, {self.hidden_size})"
            )
        return flow.out_BTD

    def _generating(self, positions: Tensor | None, cache: PartCache | None) -> dict[str, Any]:
        """What only generation asks the model for."""
        kwargs: dict[str, Any] = {"use_cache": cache is not None}
        if cache is not None:
            kwargs["cache"] = cache.layers
        if positions is not None and takes(self.model, "position_ids"):
            kwargs["position_ids"] = positions
        return kwargs

    def _check(self, x: Tensor, attention_mask: Tensor | None, past: int) -> None:
        if self.role == "bottom":
            if x.dim() != 2 or x.is_floating_point():
                raise ValueError(f"bottom takes token ids (B, T), not {x.dtype} {tuple(x.shape)}")
        elif x.dim() != 3 or x.shape[2] != self.hidden_size or not x.is_floating_point():
            raise ValueError(
                f"{self.role} takes activations (B, T, {self.hidden_size}), "
                f"not {x.dtype} {tuple(x.shape)}"
            )
        want: tuple[int, ...] = (x.shape[0], past + x.shape[1])
        if attention_mask is not None and attention_mask.dim() == 4:
            want = (x.shape[0], 1, x.shape[1], past + x.shape[1])
        if attention_mask is not None and attention_mask.shape != want:
            raise ValueError(f"attention_mask is {tuple(attention_mask.shape)}, must be {want}")

        if self.role == "bottom" and self.finds_last:
            self._check_last(x, attention_mask)

    def _check_last(self, ids_BT: Tensor, mask_BT: Tensor | None) -> None:
        """The top knows the mask alone, the whole model the ids alone: they must say the same."""
        pad = self.config.pad_token_id
        if pad is None:
            return
        by_ids = last_positions(ids_BT != pad)
        by_mask = last_positions(torch.ones_like(ids_BT) if mask_BT is None else mask_BT)
        if odd := (by_ids != by_mask).nonzero().flatten().tolist():
            row = odd[0]
            raise ValueError(
                f"row {row} ends at position {int(by_mask[row])} by its mask and at "
                f"{int(by_ids[row])} by its ids, where {type(self.model).__name__} takes {pad} for "
                "padding: mask what is padding, and pad with a token that ends no text"
            )

    def _ids_of_mask(self, h_BTD: Tensor, mask_BT: Tensor | None) -> Tensor:
        """Ids (B, T) that are padding where the mask says so; nobody embeds them."""
        pad = self.config.pad_token_id
        ids_BT = torch.full(h_BTD.shape[:2], int(pad == 0), device=h_BTD.device)
        if pad is None or mask_BT is None:
            return ids_BT
        return ids_BT.masked_fill(mask_BT == 0, pad)

    def extra_repr(self) -> str:
        return f"role={self.role}, blocks={self.blocks.start}..{self.blocks.stop - 1}"


@dataclass(frozen=True)
class Parts:
    """The three parts of one model; unpacks as ``bottom, trunk, top``."""

    bottom: Part
    trunk: Part
    top: Part

    def __iter__(self) -> Iterator[Part]:
        return iter((self.bottom, self.trunk, self.top))


def last_positions(real_BT: Tensor) -> Tensor:
    """Return (B,): the position of each row's last real token; 0 if it has none."""
    positions_T = torch.arange(real_BT.shape[1], device=real_BT.device)
    return (positions_T * real_BT.ne(0)).argmax(-1)


def split_unchecked(model: PreTrainedModel, cut: Cut) -> Parts:
    """Split a model of any family that can be carved; whether it is exact is not asked."""
    anatomy = anatomy_of.examine(model)
    bottom, trunk, top = (Part(model, role, cut, anatomy) for role in ROLES)
    return Parts(bottom, trunk, top)


def narrow(trunk: Part, cut: Cut) -> Part:
    """Look at a trunk as a client sees it that keeps more blocks than the trunk leaves it.

    Parameters
    ----------
    trunk : Part
        Left as it is. It may have adapters.
    cut : Cut
        The client's; at least the trunk's own on both sides.

    Returns
    -------
    Part
        Runs the blocks between the client's ends, exactly as `split` at `cut` would. Its
        parameters and buffers are the trunk's: no weight is copied. The trunk itself for its cut.

    Raises
    ------
    ValueError
        If the cut lies outside the trunk, or leaves no block of it.
    """
    if trunk.role != "trunk":
        raise ValueError(f"only a trunk can be narrowed, not a {trunk.role}")
    own, old = cut.ranges(trunk.num_blocks_total)["trunk"], trunk.blocks
    if own.start < old.start or own.stop > old.stop:
        raise ValueError(
            f"the trunk holds blocks {old.start} to {old.stop - 1}; the cut {cut} leaves blocks "
            f"{own.start} to {own.stop - 1} to it: keep at least {trunk.cut.bottom} below and "
            f"{trunk.cut.top} above"
        )
    if own == old:
        return trunk
    view = anatomy_of.share_copy(trunk)
    view.cut, view.blocks = cut, own
    blocks = view.model.get_submodule(view.block_list)
    assert isinstance(blocks, nn.ModuleList)
    for i in set(old) - set(own):
        # The hooks of a replaced block go with it.
        skip = Skip(blocks[i], f"{view.block_list}.{i}", view.arity)
        blocks[i] = skip.train(view.training)
    if own.start > old.start:
        if old.start:
            blocks[old.start - 1].graft_mode = "idle"
        blocks[own.start - 1].graft_mode = "deliver"
    if own.stop < old.stop:
        blocks[own.stop - 1].register_forward_hook(halt_hook)
    return view


def _carve(model: PreTrainedModel, role: str, own: range, anatomy: Anatomy) -> PreTrainedModel:
    """Return a copy of `model` in which everything but the role's own modules is a stand-in."""
    part = ask_for_logits(share_copy(model))
    kept = {"bottom": anatomy.below, "trunk": frozenset(), "top": anatomy.above}[role]
    if role != "bottom":
        for name in anatomy.dropouts:
            set_module(part, name, nn.Identity())
    for name in weight_owners(part, anatomy.blocks):
        if name not in kept:
            set_module(part, name, Vacant(part.get_submodule(name), name))
    _drop_aliases(part, anatomy.blocks)
    _carve_blocks(part.get_submodule(anatomy.blocks), role, own, anatomy)
    part._tied_weights_keys = None
    return part


def _drop_aliases(part: PreTrainedModel, blocks: str) -> None:
    """Forget weights that a module around the blocks holds: they are aliases of placed ones."""
    for name, module in part.named_modules():
        if not name or (blocks + ".").startswith(name + "."):
            for leaf in module._parameters:
                module._parameters[leaf] = None


def _carve_blocks(blocks: nn.Module, role: str, own: range, anatomy: Anatomy) -> None:
    assert isinstance(blocks, nn.ModuleList)
    for i, block in enumerate(list(blocks)):
        if i in own:
            continue
        mode = "idle"
        if role != "bottom" and i == own.start - 1:
            mode = "deliver"
        elif role == "bottom" and i == own.stop:
            mode = "halt"
        blocks[i] = Skip(block, f"{anatomy.blocks}.{i}", anatomy.arity, mode)
    if role == "trunk" and own.start == 0:
        blocks[0].register_forward_pre_hook(deliver_hook, with_kwargs=True)
    if role != "top" and len(own):
        blocks[own.stop - 1].register_forward_hook(halt_hook)
