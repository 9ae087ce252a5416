"""A bridge: a guess at what the trunk makes of h1, so that the ends alone can draft text.

A client learns it from the h1 that it sends and the h2 that it gets anyway; `strategies` averages
it with the ends. It is no part of the model: nothing of the model depends on it.

Shapes: B sequences, T tokens, D hidden size, W inner width.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

BRIDGE = "bridge."
"""Begins the names of a bridge's tensors, among those of the ends."""

BRIDGE_FILE = "bridge.safetensors"
"""Beside a model, or in a folder of ends."""

LEARNING_RATE = 2e-3
"""Of a bridge's own AdamW: its loss has no unit, so one rate does for all models."""

_FORMAT = "graft-bridge-1"


class Bridge(nn.Module):
    """``h2 ~ h1 + |h1| * gated(h1 / |h1|)``, position by position.

    One hidden layer with a gate (SwiGLU). At first it changes nothing: h1 is its guess.

    Parameters
    ----------
    hidden_size, width : int
        Of the model's activations; of the layer inside.
    seed : int
        Of its first weights; no other random number is drawn, and none of the process's.
    """

    def __init__(self, hidden_size: int, width: int, *, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        spread = hidden_size**-0.5
        shape = (width, hidden_size)
        self.gate = nn.Parameter(torch.randn(shape, generator=generator) * spread)
        self.up = nn.Parameter(torch.randn(shape, generator=generator) * spread)
        self.down = nn.Parameter(torch.zeros(hidden_size, width))

    @property
    def hidden_size(self) -> int:
        """Of the model's activations."""
        return self.gate.shape[1]

    @property
    def width(self) -> int:
        """Of the layer inside."""
        return self.gate.shape[0]

    def forward(self, h1_BTD: Tensor) -> Tensor:
        """A guess at h2 (B, T, D), in the type of h1."""
        h_BTD = h1_BTD.float()
        size_BT1 = h_BTD.square().mean(-1, keepdim=True).sqrt() + 1e-6
        x_BTD = h_BTD / size_BT1
        inner_BTW = F.silu(F.linear(x_BTD, self.gate)) * F.linear(x_BTD, self.up)
        return (h_BTD + size_BT1 * F.linear(inner_BTW, self.down)).to(h1_BTD.dtype)


class Regression:
    """Teaches a bridge what the trunk does, one micro-batch after another.

    Parameters
    ----------
    bridge : Bridge
        Changed in place.
    """

    def __init__(self, bridge: Bridge) -> None:
        self.bridge = bridge
        self._parameters = list(bridge.parameters())
        self._optimizer = torch.optim.AdamW(self._parameters, lr=LEARNING_RATE, weight_decay=0.0)

    def learn(self, h1_BTD: Tensor, h2_BTD: Tensor, mask_BT: Tensor | None) -> float:
        """Take one step; returns what the bridge missed before it, 0 to 1 of what h2 holds.

        What is not finite teaches nothing: it is the training's to refuse.
        """
        with torch.enable_grad(), torch.autocast(h1_BTD.device.type, enabled=False):
            missed = missed_share(self.bridge, h1_BTD.detach(), h2_BTD.detach(), mask_BT)
            if not torch.isfinite(missed):
                return float("nan")
            gradients = torch.autograd.grad(missed, self._parameters)
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return float(missed.detach())

    def state_dict(self) -> dict[str, Tensor]:
        """Weights and moments, flat: what `load_state_dict` takes in another process."""
        moments = self._optimizer.state_dict()["state"]
        return {
            **{f"weight/{name}": p.detach() for name, p in self.bridge.named_parameters()},
            **{f"moment/{i}/{key}": v for i, kept in moments.items() for key, v in kept.items()},
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a `state_dict`."""
        moments: dict[int, dict[str, Any]] = {}
        weights = {}
        for name, tensor in state.items():
            kind, _, rest = name.partition("/")
            if kind == "weight":
                weights[rest] = tensor
            else:
                index, _, key = rest.partition("/")
                moments.setdefault(int(index), {})[key] = tensor
        self.bridge.load_state_dict(weights)
        self._optimizer.load_state_dict({**self._optimizer.state_dict(), "state": moments})


def missed_share(bridge: Bridge, h1_BTD: Tensor, h2_BTD: Tensor, mask_BT: Tensor | None) -> Tensor:
    """What a bridge misses of h2: a mean over real positions, each by the size of its own h2.

    So no position outweighs the others: some models give their first a hundredfold size.
    """
    h2_BTD = h2_BTD.float()
    missed_BT = (bridge(h1_BTD.float()) - h2_BTD).square().mean(-1)
    share_BT = missed_BT / (h2_BTD.square().mean(-1) + 1e-12)
    return share_BT.mean() if mask_BT is None else share_BT[mask_BT.bool()].mean()


def bridge_state(bridge: Bridge) -> dict[str, Tensor]:
    """Its tensors as they travel, and are averaged; sharing memory."""
    return {BRIDGE + name: parameter.detach() for name, parameter in bridge.named_parameters()}


def take_bridge(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Divide named tensors into a bridge's, for `load_bridge_state`, and the others."""
    own = {name: tensor for name, tensor in state.items() if name.startswith(BRIDGE)}
    return own, {name: tensor for name, tensor in state.items() if name not in own}


def load_bridge_state(bridge: Bridge, state: Mapping[str, Tensor]) -> None:
    """Copy `bridge_state` into a bridge.

    Raises
    ------
    ValueError
        If a name is missing or unexpected, or a shape differs.
    """
    own = bridge_state(bridge)
    shapes = {name: tuple(tensor.shape) for name, tensor in own.items()}
    given = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if shapes != given:
        raise ValueError(f"the bridge has {shapes}, and what is given for it {given}")
    for name, tensor in own.items():
        tensor.copy_(state[name])


def save_bridge(state: Mapping[str, Tensor], path: Path, *, fingerprint: str = "") -> Path:
    """Write a bridge's tensors, named as in `bridge_state`; returns the file.

    Parameters
    ----------
    path : Path
        A folder, which gets a `BRIDGE_FILE`.
    fingerprint : str
        Of the model it was made for, if that is known; kept in the file.
    """
    file = path / BRIDGE_FILE
    path.mkdir(parents=True, exist_ok=True)
    tensors = {
        name.removeprefix(BRIDGE): tensor.detach().contiguous().cpu()
        for name, tensor in state.items()
    }
    told = json.dumps({"format": _FORMAT, "fingerprint": fingerprint})
    save_file(tensors, file, metadata={"graft": told})
    return file


def load_bridge(path: Path, *, hidden_size: int) -> Bridge:
    """Read a bridge from its file, or from the folder that holds it.

    Raises
    ------
    ValueError
        If there is none, or it is damaged, or of another model's size.
    """
    file = path / BRIDGE_FILE if path.is_dir() else path
    if not file.is_file():
        raise ValueError(
            f"{path} holds no {BRIDGE_FILE}: train the run with train.bridge=256, or make one with "
            "`graft bridge`"
        )
    try:
        with safe_open(file, "pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    gate = tensors.get("gate")
    if gate is None or gate.dim() != 2:
        raise ValueError(f"{file} is no bridge: it holds {sorted(tensors)}")
    width, size = gate.shape
    if size != hidden_size:
        raise ValueError(f"{file} is for activations of {size}, the model's have {hidden_size}")
    bridge = Bridge(hidden_size, width)
    load_bridge_state(bridge, {BRIDGE + name: tensor for name, tensor in tensors.items()})
    return bridge
