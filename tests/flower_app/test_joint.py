"""The joint model: who is named for standing out, and who is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from flower_app.build import build_client, build_trunk
from models import client_state
from strategies.aggregate.joint import JointModel
from strategies.aggregate.state import Contribution
from strategies.engine.engine import TrunkEngine
from tests.flower_app import test_app


@pytest.mark.parametrize(("sync", "named"), [("round", ["c0"]), ("step", [])])
def test_who_had_fewer_steps_in_common_ends_does_not_stand_out(
    sync: str, named: list[str], tmp_path: Path
) -> None:
    """With `train.sync=step` a client whose examples ran out holds an older state of one model."""
    config = test_app.tiny_config(tmp_path, f"train.strategy=merged train.sync={sync}")
    trunk = build_trunk(config)
    joint = JointModel(
        TrunkEngine(trunk, hidden_size=trunk.hidden_size, train=config.train), config
    )
    ends = {name: tensor.detach() for name, tensor in client_state(*build_client(config)).items()}
    joint.start(ends)
    older = {name: tensor + 0.1 for name, tensor in ends.items()}

    report = joint.update(1, [Contribution(f"c{n}", 1.0, ends if n else older) for n in range(5)])

    assert sorted(report.anomalies) == named
