"""Names and tensors of a part, as they are called in the whole model.

A part keeps the block indices of the whole model, so a global name is the local one without the
`model.` that `Part` adds. LoRA tensors are named as in the whole model with LoRA injected.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from models.parts import Part

PREFIX = "model."


def global_name(part: nn.Module, local_name: str) -> str:
    """Return the whole-model name of the tensor that `part` calls `local_name`."""
    return local_name.removeprefix(PREFIX) if isinstance(part, Part) else local_name


def named_trainable(*parts: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that require a gradient by global name; a tied one once, first name."""
    found: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for part in parts:
        for name, parameter in part.named_parameters():
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                found[global_name(part, name)] = parameter
    return found


def trainable_state(part: nn.Module) -> dict[str, Tensor]:
    """Return the trainable tensors of a part by global name.

    Parameters
    ----------
    part : Part
        Or a whole model, whose names are global already.

    Returns
    -------
    dict[str, Tensor]
        Detached, sharing memory with the part; a tied tensor appears once.
    """
    return {name: parameter.detach() for name, parameter in named_trainable(part).items()}


def load_trainable_state(part: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy `state` into the trainable tensors of a part, in place.

    Raises
    ------
    ValueError
        If a name is missing or unexpected, or a shape differs; nothing is copied then.
    """
    copy_into(named_trainable(part), state, getattr(part, "role", "model"))


def client_state(bottom: Part, top: Part) -> dict[str, Tensor]:
    """Return the trainable tensors of both client parts; a tied embedding appears once."""
    return {name: p.detach() for name, p in named_trainable(bottom, top).items()}


def load_client_state(bottom: Part, top: Part, state: Mapping[str, Tensor]) -> None:
    """Copy `state` into the trainable tensors of bottom and top; strict like the above."""
    copy_into(named_trainable(bottom, top), state, "client")


def copy_into(own: Mapping[str, nn.Parameter], state: Mapping[str, Tensor], who: str) -> None:
    """Copy `state` into the parameters `own`, in place, if names and shapes are the same."""
    problems = []
    if missing := sorted(own.keys() - state.keys()):
        problems.append(f"missing {_some(missing)}")
    if unexpected := sorted(state.keys() - own.keys()):
        problems.append(f"unexpected {_some(unexpected)}")
    for name in sorted(own.keys() & state.keys()):
        if own[name].shape != state[name].shape:
            want, got = tuple(own[name].shape), tuple(state[name].shape)
            problems.append(f"{name} has shape {got}, must be {want}")
    if problems:
        raise ValueError(f"state does not fit the {who}: {'; '.join(problems)}")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(state[name])


def _some(names: list[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
