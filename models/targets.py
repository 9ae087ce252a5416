"""Which weights of a model's blocks may have an adapter, and which of them the settings ask for.

Linear layers, the stacked weights of routed experts, and routers that are linear layers but return
more than a tensor. What PEFT refuses, or no gradient reaches, is left out: `families.NO_ADAPTER`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from models.anatomy import Anatomy, returned_arity
from models.families import NO_ADAPTER


@dataclass(frozen=True)
class Target:
    """A weight that may have an adapter."""

    name: str
    """Of the linear layer, or of the parameter, as in the whole model."""
    parameter: bool
    """Whether it is a parameter: one of PEFT's `target_parameters`."""
    block: int
    size: int


@dataclass(frozen=True)
class Inventory:
    """What a whole model offers to adapters, whoever holds it; sizes in numbers."""

    targets: tuple[Target, ...]
    left_out: Mapping[str, str]
    """Linear layers that cannot be adapted, and why."""
    blocks: tuple[int, ...]
    """Size of each block."""
    below: int
    above: int
    """Sizes of what is below and above the blocks."""

    def __deepcopy__(self, memo: object) -> Inventory:
        return self

    def choose(self, names: Sequence[str], dropout: float = 0.0) -> tuple[Target, ...]:
        """Return the targets that the settings name, in all blocks; every one if they name none.

        Raises
        ------
        ValueError
            If a name matches nothing, or nothing that can be adapted, or if dropout cannot act.
        """
        for name in names:
            if not any(_is_called(target.name, name) for target in self.targets):
                raise ValueError(self._refusal(name))
        chosen = tuple(
            target
            for target in self.targets
            if not names or any(_is_called(target.name, name) for name in names)
        )
        stacked = [target.name for target in chosen if target.parameter]
        if dropout and stacked:
            raise ValueError(
                f"lora.dropout={dropout} cannot act on {stacked[0]}: what is added to a weight "
                "that is no layer of its own never sees the input. Set lora.dropout=0, or name in "
                f"lora.target_modules none but {', '.join(self._layers_alone())}"
            )
        return chosen

    def share(self, chosen: Iterable[Target], role: str, own: range) -> float:
        """Return which share of a part's weights these targets are, in [0, 1]."""
        ends = {"bottom": self.below, "top": self.above}.get(role, 0)
        whole = ends + sum(self.blocks[own.start : own.stop])
        return sum(target.size for target in chosen if target.block in own) / max(whole, 1)

    def _layers_alone(self) -> list[str]:
        """Names that match linear layers and nothing else."""
        layers = {_last(t.name, n) for t in self.targets if not t.parameter for n in (1, 2)}
        stacked = [target.name for target in self.targets if target.parameter]
        clear = {name for name in layers if not any(_is_called(s, name) for s in stacked)}
        return sorted(n for n in clear if n.rpartition(".")[2] not in clear - {n})

    def _refusal(self, name: str) -> str:
        kinds = ", ".join(sorted({_last(target.name) for target in self.targets}))
        for layer, why in self.left_out.items():
            if _is_called(layer, name):
                return (
                    f"lora.target_modules: {name!r} cannot be adapted, {why}; take it out. "
                    f"Of these blocks, {kinds} can"
                )
        return (
            f"lora.target_modules: {name!r} is no linear layer of these blocks; they have {kinds}. "
            "Leave it empty for all of them"
        )


def take_inventory(model: PreTrainedModel, anatomy: Anatomy) -> Inventory:
    """Look through a whole model without adapters; it may be on the meta device."""
    excluded = NO_ADAPTER.get(model.config.model_type, {})
    targets: list[Target] = []
    left_out: dict[str, str] = {}
    blocks = [model.get_submodule(f"{anatomy.blocks}.{i}") for i in range(anatomy.num_blocks)]
    for i, block in enumerate(blocks):
        for name, module in block.named_modules(prefix=f"{anatomy.blocks}.{i}"):
            why = next((why for path, why in excluded.items() if f".{path}." in f"{name}."), "")
            for target in _offers(name, module, i):
                if why:
                    left_out[name] = why
                else:
                    targets.append(target)
    return Inventory(
        targets=tuple(targets),
        left_out=left_out,
        blocks=tuple(_size(block) for block in blocks),
        below=_size(*map(model.get_submodule, anatomy.below)),
        above=_size(*map(model.get_submodule, anatomy.above)),
    )


def _offers(name: str, module: nn.Module, block: int) -> list[Target]:
    if isinstance(module, (nn.Linear, Conv1D)):
        odd = _returns_tuple(module)
        return [Target(f"{name}.weight" if odd else name, odd, block, module.weight.numel())]
    if isinstance(module, _ConvNd):
        return []
    return [
        Target(f"{name}.{leaf}", True, block, parameter.numel())
        for leaf, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3 and parameter.is_floating_point()
    ]


def _returns_tuple(layer: nn.Module) -> bool:
    own = type(layer).forward
    return own not in (nn.Linear.forward, Conv1D.forward) and returned_arity(layer) > 0


def _is_called(name: str, called: str) -> bool:
    """Whether a setting names this target: in full, by its last names, or by its layer's."""
    return any(
        n == called or n.endswith("." + called) for n in (name, name.removesuffix(".weight"))
    )


def _last(name: str, count: int = 1) -> str:
    return ".".join(name.removesuffix(".weight").split(".")[-count:])


def _size(*modules: nn.Module) -> int:
    own = {id(p): p.numel() for module in modules for p in module.parameters()}
    return sum(own.values())
