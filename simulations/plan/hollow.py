"""The configured model without weights: as an outline, and filled with tensors that hold nothing.

Hollow tensors are torch's fake ones. They say that they are on the CPU, so that attention, autocast
and experts take the way that they really take there, and every operation answers with a shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import import_utils

from conf.schema import Config, ModelConfig
from models import Cut, Part, tune, tune_whole
from models.families import require_tested
from models.parts import split_unchecked
from models.source import ADAPTER_CONFIG, find_source
from models.whole import build_hollow, make_config, parse_attention, parse_dtype, read_config
from simulations.plan.live import Answers


@contextmanager
def hollow() -> Iterator[None]:
    """Whatever tensor is made in here takes no memory."""
    with ExitStack() as stack:
        # torch's own copies bytes, of which there are none.
        stack.enter_context(_replaced(FakeTensor, "__deepcopy__", _copy))
        # To a compiler, transformers gives masks that it really leaves out.
        stack.enter_context(_replaced(import_utils, "is_fake_tensor", lambda tensor: False))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(Answers())
        yield


def read_shape(config: Config) -> PretrainedConfig:
    """The model's own config; of a checkpoint nothing else is read.

    Raises
    ------
    ValueError
        If there is none, the family is untested, or the file would have to be read as a whole.
    """
    model = config.model
    if model.scratch:
        found = make_config(model.scratch)
    elif not model.path:
        raise ValueError("no model: give a folder, a hub id, or an experiment with model.scratch")
    elif model.path.endswith(".gguf"):
        raise ValueError(
            f"{model.path}: a plan reads a model's config.json alone, and a .gguf file has none; "
            "give the folder or hub id of the model that it was made from"
        )
    else:
        found = read_config(_base_of(model))
    require_tested(found, model.allow_untested)
    return found


def outline_whole(shape: PretrainedConfig, config: Config) -> PreTrainedModel:
    """The whole model on the meta device, in training mode."""
    attention = parse_attention(config.model.attention, shape)
    dtype = parse_dtype(config.model.dtype)
    return build_hollow(shape, dtype=dtype, attn_implementation=attention).train()


def outline_parts(shape: PretrainedConfig, config: Config, cut: Cut) -> list[Part]:
    """Bottom, trunk and top on the meta device, tuned as configured."""
    return [tuned(part, config) for part in split_unchecked(outline_whole(shape, config), cut)]


def tuned(part: Part, config: Config) -> Part:
    """Tune a part as configured."""
    return tune(
        part,
        getattr(config.tuning, part.role),
        lora=config.lora,
        seed=config.seed,
        freeze_a=config.aggregation.lora == "ffa",
    )


def tuned_whole(shape: PretrainedConfig, config: Config, cut: Cut) -> PreTrainedModel:
    """The outline of the unsplit model, tuned as its parts are."""
    modes = {role: getattr(config.tuning, role) for role in ("bottom", "trunk", "top")}
    return tune_whole(
        outline_whole(shape, config), modes, cut=cut, lora=config.lora, seed=config.seed
    )


def fill(modules: Sequence[nn.Module], make: Callable[[Tensor], Tensor]) -> None:
    """Put a tensor in the place of each parameter, in place; shared ones stay shared.

    Parameters
    ----------
    modules : sequence of nn.Module
        On the meta device.
    make : callable
        Returns the values of a parameter.
    """
    made: dict[
        int, tuple[nn.Parameter, nn.Parameter]
    ] = {}  # what is replaced lives on, with its id
    for module in (inner for outer in modules for inner in outer.modules()):
        for leaf, parameter in module._parameters.items():
            if parameter is None or not parameter.is_meta:
                continue
            if id(parameter) not in made:
                values = nn.Parameter(make(parameter), requires_grad=parameter.requires_grad)
                made[id(parameter)] = parameter, values
            module._parameters[leaf] = made[id(parameter)][1]


def fill_hollow(modules: Sequence[nn.Module]) -> None:
    """Fill an outline with hollow tensors; call it inside `hollow`."""
    fill(modules, lambda like: torch.empty(like.shape, dtype=like.dtype))
    for module in (inner for outer in modules for inner in outer.modules()):
        for leaf, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[leaf] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _base_of(model: ModelConfig) -> str:
    """Where the model's config is: an adapter's is its base's. Weights need not be there."""
    folder = Path(model.path).expanduser()
    if (folder / ADAPTER_CONFIG).is_file():
        return find_source(model.path, model.base).base
    return str(folder) if folder.is_dir() else model.path


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _copy(tensor: FakeTensor, memo: dict[int, Any]) -> Any:
    if id(tensor) not in memo:
        twin = tensor.detach().clone()
        if isinstance(tensor, nn.Parameter):
            twin = nn.Parameter(twin, requires_grad=tensor.requires_grad)
        memo[id(tensor)] = twin
    return memo[id(tensor)]
