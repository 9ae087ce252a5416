"""What a claim of equality is, and what it is tried with: configuration and batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from conf.schema import (
    Config,
    CutConfig,
    DataConfig,
    FederationConfig,
    LinkConfig,
    LoraSettings,
    ModelConfig,
    OutputConfig,
    TrainConfig,
    TuningConfig,
)
from simulations.equality.federation import Gap, random_steps
from simulations.equality.subjects import Subject

MODES = {
    "all": ("full", "full", "full"),
    "LoRA": ("lora", "lora", "lora"),
    "trunk": ("frozen", "full", "frozen"),
    "trunk LoRA": ("frozen", "lora", "frozen"),
}
"""What is trained in bottom, trunk and top."""


class NotTriedError(Exception):
    """Why a claim says nothing about a model."""


@dataclass(frozen=True)
class Claim:
    """One row of the table for each model."""

    text: str
    measure: Callable[[Subject, Claim], Gap]
    tolerance: float
    trains: str = ""
    """One of `MODES`; empty: nothing."""
    optimizer: str = ""
    train: dict[str, Any] = field(default_factory=dict)


def train_config(subject: Subject, claim: Claim, **train: Any) -> Config:
    """The training that a claim is about, on a model with its cut."""
    values = {"rounds": 2, "clip": 0.5, "weight_decay": 0.01, "schedule": "cosine"}
    values |= {"optimizer": claim.optimizer, **train, **claim.train}
    values.setdefault("lr", 0.3 if claim.optimizer == "sgd" else 3e-3)
    bottom, trunk, top = MODES[claim.trains]
    return Config(
        cut=CutConfig(bottom=subject.cut.bottom, top=subject.cut.top),
        tuning=TuningConfig(bottom=bottom, trunk=trunk, top=top),
        lora=LoraSettings(rank=4),
        train=TrainConfig(**values),  # type: ignore[arg-type]
    )


def app_config(
    subject: Subject, claim: Claim, link: LinkConfig, clients: int, folder: str, micros: int = 2
) -> Config:
    """The same for the whole app, on the model's folder and the built-in text."""
    steps = 1 if subject.large else 3
    config = train_config(subject, claim, local_steps=steps, batch_size=2, accumulate=micros)
    return replace(
        config,
        model=ModelConfig(
            path=str(subject.folder),
            tokenizer=subject.tokenizer,
            attention=str(subject.model.config._attn_implementation),
            allow_untested=subject.allow_untested,
        ),
        data=DataConfig(context=24, max_examples=12, heldout=0.2),
        federation=FederationConfig(
            min_clients=clients, quorum=1.0, round_timeout=600.0, fraction_evaluate=0.0
        ),
        link=link,
        output=OutputConfig(folder=folder),
    ).check()


def unequal_cohorts(subject: Subject) -> list[list[list[list[Any]]]]:
    """Two rounds of three clients of unequal steps, batch sizes, lengths and paddings."""
    least = 1 if subject.large else 2
    return [
        [
            draw_steps(
                subject,
                least + client,
                seed=1000 * number + 10 * client,
                accumulate=1 + client % 2,
                padding=("left", "right", "none")[client],
            )
            for client in range(3)
        ]
        for number in (1, 2)
    ]


def draw_steps(subject: Subject, count: int, **how: Any) -> list[list[Any]]:
    """Random batches of one client, step by step, as the model reads them."""
    text = subject.model.config.get_text_config(decoder=True)
    return random_steps(count, vocabulary=text.vocab_size, **how)
