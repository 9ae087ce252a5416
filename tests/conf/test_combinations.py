"""What may not be set together across sections is refused, with the remedy."""

from __future__ import annotations

import pytest

from conf.load import load_config
from conf.rules import ConfigError


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            "aggregation.ends=local train.strategy=merged train.sync=step",
            r"cannot take a common step .*set train\.sync=round",
        ),
        (
            "aggregation.ends=local-top aggregation.optimizer=fedadam",
            r"cannot be moved by a server optimizer.*aggregation\.optimizer=fedavg",
        ),
        (
            "aggregation.ends=local data.central_path=/data/own.jsonl",
            r"cannot be evaluated by the server .*own\.jsonl.*clear it",
        ),
        (
            "aggregation.ends=local output.checkpoint_every=3",
            r"checkpoint_every=3 with aggregation\.ends=local.*checkpoint_every=1, or 0",
        ),
        ("output.share_trunk=true", r"share_trunk=true is for aggregation\.ends=local"),
        ("aggregation.ends=own", "must be one of|average, local"),
        (
            "privacy.ends=masked train.strategy=merged train.sync=step",
            r"train\.sync=step with privacy\.ends=masked.*set train\.sync=round",
        ),
        (
            "privacy.ends=masked aggregation.optimizer=fedadam",
            r"optimizer=fedadam with privacy\.ends=masked.*aggregation\.optimizer=fedavg",
        ),
        (
            "privacy.ends=masked aggregation.lora=exact tuning.trunk=lora",
            r"aggregation\.lora=exact with privacy\.ends=masked.*lora=factors or ffa",
        ),
        (
            "privacy.ends=masked aggregation.lora=svd tuning.trunk=lora",
            r"aggregation\.lora=svd with privacy\.ends=masked",
        ),
        ("privacy.ends=masked aggregation.ends=local-top", r"ends=local-top with privacy\.ends"),
        ("privacy.ends=masked aggregation.robust=median", r"robust=median with privacy\.ends"),
        ("privacy.ends=masked train.bridge=16", r"bridge=16 with privacy\.ends=masked"),
        (
            "privacy.ends=masked data.central_path=/data/own.jsonl",
            r"own\.jsonl' with privacy\.ends=masked: the server only adds",
        ),
        ("privacy.ends=hidden", "must be one of|plain, masked"),
        (
            "train.patience=2 output.model=best data.heldout=0",
            r"train\.patience=2 and output\.model=best by a held-out loss, and nobody evaluates",
        ),
        (
            "train.patience=2 federation.fraction_evaluate=0",
            r"nobody evaluates .*fraction_evaluate=0.*data\.central_path",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(overrides: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_config("demo", overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        "aggregation.ends=local aggregation.lora=exact tuning.trunk=lora",
        "aggregation.ends=local output.checkpoint_every=0 output.share_trunk=true",
        "aggregation.ends=local-top train.strategy=merged train.prox=0.1",
        "privacy.ends=masked tuning.trunk=lora aggregation.lora=ffa train.strategy=merged",
        "train.patience=2 output.model=best data.heldout=0 data.central_path=/data/own.jsonl",
    ],
)
def test_what_goes_together_is_accepted(overrides: str) -> None:
    load_config("demo", overrides)
