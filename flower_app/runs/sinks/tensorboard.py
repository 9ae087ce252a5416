"""TensorBoard: event files in the run's folder, under `tensorboard`."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from typing import Any

from flower_app.runs.folders import FAILED, STOPPED
from flower_app.runs.history import read_history
from flower_app.runs.instants import instant
from flower_app.runs.journal import as_record
from flower_app.runs.sinks._scalars import ROUND, hyperparameters, scalars
from flower_app.runs.sinks.registry import Run
from strategies.events import Event

NEEDS = "tensorboard"
FLUSH = 10
"""Seconds after which a number is in the file."""
LAYOUT = {
    "clients": {
        f"train/{name}": ["Multiline", [rf"train/{name}/.*"]]
        for name in ("loss", "grad_norm", "lr", "tokens_per_second")
    }
}
"""Of the tab `Custom scalars`: all clients in one chart."""


class Sink:
    """Writes scalars, hyper-parameters and how the run ended.

    A resumed run's files are written anew from its journal, which was cut back: what was undone is
    in no chart.
    """

    def __init__(self, run: Run) -> None:
        self._run, self._folder = run, run.folder / "tensorboard"

    def start(self) -> None:
        """Write the hyper-parameters, and what a resumed run has done before."""
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        if self._run.after is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._writer = SummaryWriter(str(self._folder), flush_secs=FLUSH)
        # Not `add_hparams`, which would put them into a run of their own.
        told, begun, self._ended = hparams(
            hyperparameters(self._run.config), {"eval/loss": 0.0, "train/loss": 0.0}
        )
        self._writer.file_writer.add_summary(told)
        self._writer.file_writer.add_summary(begun)
        self._writer.add_custom_scalars(LAYOUT)
        self._writer.add_text("run", f"`{self._run.folder}`")
        for record in self._before():
            self._add(record)
        self._writer.flush()

    def event(self, event: Event) -> None:
        """Add its numbers."""
        self._add(as_record(event))

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write how it ended; a stopped run may go on, so it has not."""
        if summary["status"] != STOPPED:
            if summary["status"] == FAILED:
                self._ended = _failed(self._ended)
            self._writer.file_writer.add_summary(self._ended)
        self._writer.close()

    def _add(self, record: Mapping[str, Any]) -> None:
        if (told := scalars(record)) is None:
            return
        when = instant(record["time"]).timestamp() if "time" in record else None
        for tag, value in told.values.items():
            self._writer.add_scalar(tag, value, told.step, walltime=when)
        if told.axis == ROUND:
            self._writer.flush()

    def _before(self) -> list[dict[str, Any]]:
        """What the journal holds up to where a stopped run goes on."""
        if (after := self._run.after) is None:
            return []
        history = read_history(self._run.folder)
        return [told for told in (*history.steps, *history.rounds) if told["round"] <= after]


def _failed(ended: Any) -> Any:
    """The summary that ends a session, with the other status."""
    from tensorboard.plugins.hparams.api_pb2 import Status
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    plugin = ended.value[0].metadata.plugin_data
    told = HParamsPluginData.FromString(plugin.content)
    told.session_end_info.status = Status.Value("STATUS_FAILURE")
    plugin.content = told.SerializeToString()
    return ended
