"""Floating-point operations of a step, of the whole model and of its parts, as torch counts them.

Matrix products and attention are, forward and backward; attention as if nothing were masked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from conf.schema import Config
from flower_app.build import build_client, build_trunk
from flower_app.client.ends import token_loss
from simulations.bench.compare.data import Batch
from simulations.bench.compare.fedavg.app import load_model, summed_loss

_Shape = tuple[int, ...]


def _attention(q: _Shape, k: _Shape, v: _Shape, *rest: Any, **more: Any) -> int:
    return int(sdpa_flop_count(q, k, v))


def _attention_back(grad: _Shape, q: _Shape, k: _Shape, v: _Shape, *rest: Any, **more: Any) -> int:
    return int(sdpa_backward_flop_count(grad, q, k, v))


_CPU = {  # torch's own formulas, for the kernels that its list leaves out
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_back,
}


def count_flops(config: Config) -> dict[str, int]:
    """Count a training step on one full micro-batch, without the optimizer.

    Parameters
    ----------
    config : Config
        Of `config_of`.

    Returns
    -------
    dict
        Operations of ``whole``, ``bottom``, ``trunk`` and ``top``, forward and backward; and of
        ``again``: bottom's forward, which a client computes a second time over ``messages``.
    """
    batch = full_batch(config)
    model = load_model(config).train()
    whole = _count(lambda: summed_loss(model, batch).backward())
    bottom, top = build_client(config)
    trunk = build_trunk(config)
    for part in (bottom, trunk, top):
        part.train()
    h1_BTD = bottom(batch.input_ids, None)
    forward = _count(lambda: bottom(batch.input_ids, None))
    h1_cut_BTD = h1_BTD.detach().requires_grad_()
    h2_BTD = trunk(h1_cut_BTD, None)
    trunk_forward = _count(lambda: trunk(h1_cut_BTD, None))
    h2_cut_BTD = h2_BTD.detach().requires_grad_()
    of_top = _count(lambda: token_loss(top(h2_cut_BTD, None), batch.labels)[0].backward())
    of_trunk = trunk_forward + _count(lambda: h2_BTD.backward(h2_cut_BTD.grad))
    of_bottom = forward + _count(lambda: h1_BTD.backward(h1_cut_BTD.grad))
    return {
        "whole": whole,
        "bottom": of_bottom,
        "trunk": of_trunk,
        "top": of_top,
        "again": forward,
    }


def full_batch(config: Config) -> Batch:
    """A micro-batch of the largest size, without padding."""
    shape = (config.train.batch_size, config.data.context)
    ids = torch.randint(3, 259, shape, generator=torch.Generator().manual_seed(0))
    return Batch(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)


def _count(work: Callable[[], object]) -> int:
    with FlopCounterMode(display=False, custom_mapping=_CPU) as counter:
        work()
    return int(counter.get_total_flops())
