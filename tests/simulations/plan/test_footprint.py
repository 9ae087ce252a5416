"""A plan's memory and bytes against those of real steps: 10 % are allowed, 1 % is held to."""

from __future__ import annotations

import pytest

from flower_app.build import cut_of
from simulations.plan.families import VOCABULARY, family_config
from simulations.plan.footprint import client_footprint, server_footprint
from simulations.plan.frames import step_frames
from simulations.plan.hollow import outline_parts, read_shape
from simulations.plan.measured import measure_step
from strategies.optim import trainable

SIZES = ["cut.bottom=1", "cut.top=1", "train.batch_size=4", "data.context=96"]
CASES = {
    "llama": [],
    "gpt2": ["train.accumulate=2", "link.codec=bf16"],
    "gemma2": ["tuning.bottom=lora", "tuning.trunk=lora", "tuning.top=lora"],
    "qwen3": ["train.precision=bf16", "train.strategy=splitfed-v2"],
    "mixtral": ["tuning.trunk=lora", "link.codec=fp16"],
    "mistral": ["train.accumulate=4", "link.window=2", "tuning.bottom=frozen"],
    "phi": ["train.accumulate=2", "link.window=1", "tuning.bottom=frozen", "tuning.trunk=frozen"],
    "opt": ["tuning.bottom=frozen", "tuning.trunk=frozen"],  # its top is tied to its bottom
}


@pytest.mark.parametrize("family", CASES)
def test_memory_and_bytes_are_those_of_a_real_step(family: str) -> None:
    config = family_config(family, 128, 3, [*SIZES, *CASES[family]])
    shape = read_shape(config)
    client, server = client_footprint(shape, config), server_footprint(shape, config)
    bottom, trunk, _ = outline_parts(shape, config, cut_of(config))
    learns = {"bottom_learns": bool(trainable(bottom)), "trunk_learns": bool(trainable(trunk))}
    frames = step_frames(config, 128, **learns)

    real = measure_step(config, VOCABULARY)

    assert client.peak == pytest.approx(real.client_peak, rel=0.01)
    assert server.peak == pytest.approx(real.server_peak, rel=0.01)
    assert (frames.up, frames.down) == pytest.approx((real.up, real.down), rel=1e-4)
