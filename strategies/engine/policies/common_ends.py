"""The clients' bottom and top where all of them take one common step (`train.sync=step`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from conf.schema import TrainConfig
from strategies.engine.checks import check_bounded
from strategies.errors import TrunkError
from strategies.optim import build_optimizer, square_norm


class CommonEnds:
    """The clients' bottom and top, which under `train.sync=step` take one common step.

    Parameters
    ----------
    state : mapping
        Their trainable tensors by global name, floating point.
    train : TrainConfig
        Optimizer settings. The optimizer lives as long as the run.
    """

    def __init__(self, state: Mapping[str, Tensor], train: TrainConfig) -> None:
        self.parameters = {name: nn.Parameter(value.clone()) for name, value in state.items()}
        self.optimizer = build_optimizer(list(self.parameters.values()), train)

    def set_gradients(self, gradients: Sequence[tuple[int, Mapping[str, Tensor]]]) -> float:
        """Take the mean of the clients' gradients, weighted by tokens; returns its squared norm."""
        total = sum(tokens for tokens, _ in gradients)
        for name, parameter in self.parameters.items():
            mean = torch.zeros_like(parameter, dtype=torch.float64)
            for tokens, own in gradients:
                if tokens:
                    mean.add_(own[name].to(mean), alpha=tokens / total)
            parameter.grad = mean.to(parameter.dtype)
        return square_norm(self.parameters.values())

    def check(self, gradients: Mapping[str, Tensor]) -> None:
        """Refuse gradients that are not of exactly these tensors."""
        self.check_shapes({name: tuple(gradient.shape) for name, gradient in gradients.items()})
        for name, gradient in gradients.items():
            check_bounded(gradient, f"the gradient of '{name}'")

    def check_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Refuse other names or shapes than those of these tensors."""
        odd = sorted(self.parameters.keys() ^ shapes.keys())
        odd = odd or [n for n, shape in shapes.items() if shape != self.parameters[n].shape]
        if odd:
            raise TrunkError(
                f"the gradients differ from the clients' common tensors in {odd[:3]}", kind="shape"
            )

    def state(self) -> dict[str, Tensor]:
        """The tensors after the last step."""
        return {name: parameter.detach() for name, parameter in self.parameters.items()}
