"""A name that no registry knows is refused with the nearest, before anything is started."""

from __future__ import annotations

import subprocess
import sys

import pytest
from typer.testing import CliRunner

from conf.load import load_config
from conf.rules import ConfigError
from flower_app.check import check_names
from simulations.launch.preflight import check_run


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.strategy=fedavg", r"one of merged, splitfed-v1, splitfed-v2.*, got 'fedavg'$"),
        ("train.strategy=merge", r"one of .*, got 'merge'; did you mean 'merged'\?"),
        ("link.codec=fp8", r"one of bf16, fp16, fp32, int2, .*, klt-rough, got 'fp8'"),
        ("aggregation.lora=exakt tuning.trunk=lora", r"one of .*factors.*; did you mean 'exact'\?"),
    ],
)
def test_a_name_that_nobody_offers_is_refused_with_the_nearest(override: str, words: str) -> None:
    config = load_config("demo", override)
    key = override.partition("=")[0]
    with pytest.raises(ConfigError, match=rf"{key}(\.h1)? must be {words}") as caught:
        check_names(config)
    assert caught.value.key in (key, f"{key}.h1")
    with pytest.raises(ConfigError, match=rf"{key}(\.h1)? must be {words}"):
        check_run("demo", override)


def test_graft_config_refuses_it_too() -> None:
    from simulations.cli.app import app

    result = CliRunner().invoke(app, ["config", "demo", "train.strategy=merge"])
    assert result.exit_code != 0
    assert "did you mean 'merged'?" in str(result.exception or "") + result.output


def test_graft_config_does_not_wait_for_torch() -> None:
    names = '["config", "lora", "train.strategy=merged", "aggregation.lora=ffa", "link.codec=bf16"]'
    code = f"import sys; from simulations.cli.app import app; app({names}, standalone_mode=False)"

    done = subprocess.run(
        [sys.executable, "-c", f"{code}; sys.exit('torch' in sys.modules)"],
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert "strategy: merged" in done.stdout
