"""Split a Hugging Face causal LM into bottom, trunk and top without forking its code.

Legend: B batch, T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from models import anatomy as anatomy_of
from models.anatomy import Anatomy, set_module, share_copy, weight_owners
from models.cut import ROLES, Cut
from models.families import require_tested
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
    """

    def __init__(self, model: PreTrainedModel, role: str, cut: Cut, anatomy: Anatomy) -> None:
        super().__init__()
        self.role = role
        self.cut = cut
        self.block_list = anatomy.blocks
        self.arity = anatomy.arity
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

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Run the part.

        Parameters
        ----------
        x : Tensor
            bottom: token ids (B, T), integer. trunk and top: activations (B, T, D).
        attention_mask : Tensor, optional
            (B, T), 1 for tokens and 0 for padding on either side.

        Returns
        -------
        Tensor
            bottom and trunk: activations (B, T, D). top: logits (B, T, V).

        Raises
        ------
        ValueError
            If a shape is wrong.
        """
        self._check(x, attention_mask)
        kwargs: dict[str, Any] = {"attention_mask": attention_mask, "use_cache": False}
        dtype = self.dtype
        flow = Flow(standin(x.shape[0], x.shape[1], self.hidden_size, x, dtype))
        if self.role == "bottom":
            kwargs["input_ids"] = x
        else:
            kwargs["inputs_embeds"] = flow.standin_BTD
            flow.h_BTD = x.to(dtype)
        output = run_with(flow, lambda: self.model(**kwargs))
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

    def _check(self, x: Tensor, attention_mask: Tensor | None) -> None:
        if self.role == "bottom":
            if x.dim() != 2 or x.is_floating_point():
                raise ValueError(f"bottom takes token ids (B, T), not {x.dtype} {tuple(x.shape)}")
        elif x.dim() != 3 or x.shape[2] != self.hidden_size or not x.is_floating_point():
            raise ValueError(
                f"{self.role} takes activations (B, T, {self.hidden_size}), "
                f"not {x.dtype} {tuple(x.shape)}"
            )
        if attention_mask is not None and attention_mask.shape != x.shape[:2]:
            raise ValueError(
                f"attention_mask is {tuple(attention_mask.shape)}, must be {tuple(x.shape[:2])}"
            )

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


def split(model: PreTrainedModel, cut: Cut, *, allow_untested: bool = False) -> Parts:
    """Split a causal LM into three parts that share its parameters.

    Parameters
    ----------
    model : PreTrainedModel
        A `transformers` causal LM. It is left as it is.
    cut : Cut
    allow_untested : bool
        Split a family that is not in the tested table, after comparing the split with the model
        itself (logits) and with a tiny model of its config (logits and every gradient).

    Returns
    -------
    Parts

    Raises
    ------
    ValueError
        If the cut leaves no trunk, or the family is untested or cannot be split.
    """
    tested = require_tested(model.config, allow_untested)
    parts = split_unchecked(model, cut)
    if not tested:
        from models.verify import check_forward, check_twin  # verify itself splits

        check_forward(model, parts)
        check_twin(model.config, cut)
    return parts


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
    part = share_copy(model)
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
