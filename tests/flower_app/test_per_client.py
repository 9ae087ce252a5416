"""What a round's record says of each client is what that client and its steps came to."""

from __future__ import annotations

from pathlib import Path

import pytest
from flwr.supercore.task_identity import TaskIdentity

from flower_app.client.step import PHASES
from tests.flower_app.grid import InProcessGrid
from tests.flower_app.runs import test_resume


@pytest.fixture(autouse=True)
def _flower_task(one_thread: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    monkeypatch.setattr("flower_app.runs.recorder.plot_loss", lambda folder: None)


@pytest.mark.parametrize("transport", ["stream", "messages"])
def test_each_client_is_told_apart(transport: str, tmp_path: Path) -> None:
    """Its losses make the round's, its seconds are its steps', and nobody's are another's."""
    changes = f"train.rounds=2 train.accumulate=2 link.transport={transport}"

    folder = test_resume.run(test_resume.configured(tmp_path, changes), InProcessGrid(2))

    records = test_resume.records(folder)
    for done in (r for r in records if r["kind"] == "round"):
        told = done["per_client"]
        assert sorted(told) == ["client-0", "client-1"]
        for what in ("train", "evaluate"):
            if done[what] is None:  # round 0
                assert all(what not in each for each in told.values())
                continue
            own = [each[what] for each in told.values()]
            tokens = sum(each["num-tokens"] for each in own)
            assert tokens == done[what]["num-tokens"]
            mean = sum(each["loss"] * each["num-tokens"] for each in own) / tokens
            assert mean == pytest.approx(done[what]["loss"])
            assert own[0]["loss"] != own[1]["loss"]
            assert all(each["peak-memory-mb"] > 50 for each in own)
            known = [p for p in PHASES if (transport, p) != ("messages", "network")]
            # What is left for it: nothing, where the trunk works on one micro-batch while the ends
            # work on another.
            least = {"network": 0.0}
            told_of = [(phase, each[f"seconds-{phase}"]) for each in own for phase in known]
            assert all(s >= least.get(phase, 1e-9) for phase, s in told_of), told_of
        steps = [r for r in records if (r["kind"], r["round"]) == ("step", done["round"])]
        for step in steps:
            assert told[step["client"]]["train"]["num-steps"] == len(steps) / 2
        for name, each in told.items() if steps else ():
            for phase in ("bottom", "top"):
                spent = sum(s["seconds"][phase] for s in steps if s["client"] == name)
                assert each["train"][f"seconds-{phase}"] == pytest.approx(spent)
