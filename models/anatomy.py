"""Find out how a model is built: its block list, and which part each other module belongs to.

Nothing is known about families here. The block list is the one `ModuleList` as long as
`num_hidden_layers`; what runs before and after it is learned by running the model once with all
weights replaced by stand-ins, which costs nothing and works on the meta device too.
"""

from __future__ import annotations

import ast
import copy
import inspect
import textwrap
import threading
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from models.families import refuse_flags
from models.flow import Flow, Skip, Vacant, run_with, standin

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Anatomy:
    """Names of modules as in the whole model."""

    blocks: str
    """Name of the block list, `model.layers` say."""
    num_blocks: int
    arity: int
    """0: a block returns a tensor; n: a tuple of n, the hidden states first."""
    below: frozenset[str]
    """Modules with weights that run before the blocks."""
    above: frozenset[str]
    """Modules with weights that run after the blocks; a tied module may be in both."""
    dropouts: frozenset[str]
    """Dropouts that run before the blocks."""
    finds_last: bool
    """The head looks for each text's last token by the padding among the ids."""


def examine(model: PreTrainedModel) -> Anatomy:
    """Find the block list of `model` and sort the modules outside it.

    Raises
    ------
    ValueError
        If the model cannot be split: encoder-decoder, no single block list, weights that are used
        between the blocks or shared by several, weights whose part cannot be told.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        raise unsplittable(model, "it is an encoder-decoder")
    refuse_flags(model.config)
    name = find_blocks(model)
    blocks = model.get_submodule(name)
    assert isinstance(blocks, nn.ModuleList)
    _refuse_shared_weights(model, name)
    arity = returned_arity(blocks[0])
    try:
        calls = _trace(model, name, arity)
    except Unsplittable:
        raise
    except Exception as error:  # whatever a model's own code may raise
        raise unsplittable(model, f"its outline does not run ({error})") from error
    marks = [i for i, call in enumerate(calls) if call.startswith(name + ".")]
    if [calls[i] for i in marks] != [f"{name}.{i}" for i in range(len(blocks))]:
        raise unsplittable(model, "its forward does not run each block once, in order")
    below, between, above = calls[: marks[0]], calls[marks[0] : marks[-1]], calls[marks[-1] + 1 :]
    strays = sorted({call for call in between if not call.startswith(name + ".")})
    if strays:
        raise unsplittable(model, f"{', '.join(strays)} runs between the blocks")
    owners = set(weight_owners(model, name))
    _refuse_unplaced(model, name, owners - set(below) - set(above), owners)
    return Anatomy(
        blocks=name,
        num_blocks=len(blocks),
        arity=arity,
        below=frozenset(set(below) & owners),
        above=frozenset(set(above) & owners),
        dropouts=frozenset(set(below) - owners),
        finds_last=finds_last_token(model),
    )


class Unsplittable(ValueError):
    """A model that cannot be split, and why."""


def unsplittable(model: PreTrainedModel, why: str) -> Unsplittable:
    """Return the error that refuses a model."""
    return Unsplittable(f"{model.config.model_type} cannot be split: {why}")


def find_blocks(model: PreTrainedModel) -> str:
    """Return the name of the one block list of `model`."""
    config = model.config.get_text_config(decoder=True)
    number = getattr(config, "num_hidden_layers", None)
    found = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == number
    ]
    outer = [n for n in found if not any(n.startswith(other + ".") for other in found)]
    if len(outer) != 1:
        found_text = f"{len(outer)} lists of {number} blocks ({', '.join(outer) or 'none'})"
        raise unsplittable(model, f"found {found_text}, need exactly one")
    return outer[0]


def count_blocks(model: PreTrainedModel) -> int:
    """Return how many blocks `model` has."""
    blocks = model.get_submodule(find_blocks(model))
    assert isinstance(blocks, nn.ModuleList)
    return len(blocks)


_PARSING = threading.Lock()
"""Python 3.11 cannot build syntax trees in two threads at once (CPython issue 106905)."""


def returned_arity(block: nn.Module) -> int:
    """Read from its source how many values `block.forward` returns; 0 if a bare tensor."""
    forward = inspect.unwrap(type(block).forward)
    with _PARSING:
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    named: dict[str, int] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            size = _tuple_size(node.value, {})
            if size:
                named.setdefault(node.targets[0].id, size)
    returns = [node.value for node in ast.walk(tree) if isinstance(node, ast.Return) and node.value]
    return max((_tuple_size(value, named) for value in returns), default=0)


def _tuple_size(node: ast.expr, named: dict[str, int]) -> int:
    if isinstance(node, ast.Tuple):
        return len(node.elts)
    if isinstance(node, ast.Name):
        return named.get(node.id, 0)
    if isinstance(node, ast.BinOp):
        left, right = _tuple_size(node.left, named), _tuple_size(node.right, named)
        return left + max(right, 1) if left else 0
    return 0


def share_copy(model: M) -> M:
    """Copy the modules and the config of `model`; parameters and buffers stay the same objects."""
    memo = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    return copy.deepcopy(model, memo)


# What configs ask for beside the logits; a part has nothing else to give.
_OUTPUTS = {
    "return_dict": True,
    "output_hidden_states": False,
    "output_attentions": False,
    "output_router_logits": False,
    "output_router_probs": False,
}


def ask_for_logits(model: M) -> M:
    """Make `model` return its logits alone, by name, whatever its configs say; in place."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PretrainedConfig):
            for flag, value in _OUTPUTS.items():
                if getattr(config, flag, value) != value:
                    setattr(config, flag, value)
    return model


def finds_last_token(model: PreTrainedModel) -> bool:
    """Whether the model's own forward compares the ids with the padding token.

    Heads that classify a whole text do: they take the logits of its last token.
    """
    forward = inspect.unwrap(type(model).forward)
    return "pad_token_id" in forward.__code__.co_names


def set_module(root: nn.Module, name: str, module: nn.Module) -> None:
    """Replace the submodule `name` of `root`."""
    parent, _, leaf = name.rpartition(".")
    root.get_submodule(parent)._modules[leaf] = module


def weight_owners(model: nn.Module, blocks: str) -> list[str]:
    """Return the outermost modules with parameters of their own, apart from the blocks."""
    found: list[str] = []
    for name, module in model.named_modules(remove_duplicate=False):
        if (blocks + ".").startswith(name + ".") or not name or name.startswith(blocks + "."):
            continue
        if any(name.startswith(outer + ".") for outer in found):
            continue
        if any(p is not None for p in module._parameters.values()):
            found.append(name)
    return found


def _trace(model: PreTrainedModel, blocks: str, arity: int) -> list[str]:
    """Run a hollow copy of `model` once; return the names of its stand-ins in calling order."""
    hollow = ask_for_logits(share_copy(model)).eval()
    owners = weight_owners(hollow, blocks)
    inside = tuple(name + "." for name in (blocks, *owners))
    dropouts = [n for n, m in hollow.named_modules() if isinstance(m, nn.Dropout)]
    for name in [*owners, *(n for n in dropouts if not n.startswith(inside))]:
        set_module(hollow, name, Vacant(hollow.get_submodule(name), name))
    stack = hollow.get_submodule(blocks)
    assert isinstance(stack, nn.ModuleList)
    for i, block in enumerate(list(stack)):
        stack[i] = Skip(block, f"{blocks}.{i}", arity)
    rows = 1 if finds_last_token(model) else 2  # without a pad token such heads take one text
    ids_BT = torch.zeros(rows, 3, dtype=torch.long)
    mask_BT = torch.ones_like(ids_BT)
    flow = Flow(standin(rows, 3, width(model), None, torch.float32))
    with torch.no_grad():
        call = {"input_ids": ids_BT, "attention_mask": mask_BT, "use_cache": False}
        output = run_with(flow, lambda: hollow(**call))
    _refuse_other_outputs(model, output)
    return flow.calls


def _refuse_other_outputs(model: PreTrainedModel, output: Any) -> None:
    """Refuse a model whose answer is not its logits, or not they alone."""
    names = [name for name in output if name.endswith("logits")]
    if names != ["logits"]:
        kind = type(model).__name__
        answers = f"answers with {', '.join(names)}" if names else "has no head: it gives no logits"
        raise unsplittable(model, f"{kind} {answers}; a top gives one tensor of logits")


def width(model: PreTrainedModel) -> int:
    """Return D, the width of the hidden states between the blocks."""
    return int(model.config.get_text_config(decoder=True).hidden_size)


def _refuse_unplaced(
    model: PreTrainedModel, blocks: str, unused: set[str], owners: set[str]
) -> None:
    """Refuse weights outside the blocks that no stand-in answered for."""
    used = owners - unused
    known = {id(p) for n in used for p in model.get_submodule(n).parameters()}
    inside = tuple(n + "." for n in (blocks, *used))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not name.startswith(inside) and id(parameter) not in known:
            raise unsplittable(model, f"cannot tell which part uses the weight {name}")


def _refuse_shared_weights(model: PreTrainedModel, blocks: str) -> None:
    seen: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        inside = name.startswith(blocks + ".")
        home = name[len(blocks) + 1 :].split(".")[0] if inside else "outside"
        if seen.setdefault(id(parameter), home) != home:
            raise unsplittable(model, f"{name} is shared between blocks")
