"""MLflow: on the server that MLFLOW_TRACKING_URI names, else in a database beside the runs."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

from flower_app.runs.folders import FAILED, STOPPED
from flower_app.runs.journal import as_record
from flower_app.runs.sinks._identity import keep, project, recall
from flower_app.runs.sinks._scalars import hyperparameters, scalars
from flower_app.runs.sinks.registry import Run
from strategies.events import Event

NEEDS = "mlflow"
BATCH, PARAMS = 500, 100
"""Metrics and parameters that one call may hold, with room to spare."""
EVERY = 5.0
"""Seconds between two calls while metrics come."""
ENDS = {FAILED: "FAILED", STOPPED: "KILLED"}


class Sink:
    """Logs metrics in batches, by a client of its own: MLflow's active run is left alone."""

    def __init__(self, run: Run) -> None:
        self._run, self._owed, self._sent = run, list[Any](), time.monotonic()

    def start(self) -> None:
        """Begin the run, or go on with the one that was begun before."""
        from mlflow import MlflowClient
        from mlflow.entities import Param

        folder, uri = self._run.folder, os.environ.get("MLFLOW_TRACKING_URI")
        uri = uri or f"sqlite:///{folder.parent / 'mlflow.db'}"
        self._client = client = MlflowClient(uri)
        self._id = recall(self._run, "mlflow").get("run_id", "")
        if self._id:
            client.update_run(self._id, status="RUNNING")
        else:
            experiment = self._experiment(project(self._run, "MLFLOW_EXPERIMENT_NAME"))
            tags = {
                "graft.run_folder": str(folder),
                "graft.experiment": self._run.config.experiment,
            }
            made = client.create_run(experiment, run_name=folder.name, tags=tags)
            self._id = made.info.run_id
            keep(self._run, "mlflow", run_id=self._id, tracking_uri=uri)
            told = hyperparameters(self._run.config)
            params = [Param(name, str(value)[:6000]) for name, value in told.items()]
            for first in range(0, len(params), PARAMS):
                client.log_batch(self._id, params=params[first : first + PARAMS])
        self._run.say(f"MLflow: run {self._id} at {uri}")

    def event(self, event: Event) -> None:
        """Log its numbers, with those that come soon after."""
        from mlflow.entities import Metric

        told, now = scalars(as_record(event)), int(time.time() * 1000)
        if told is not None:
            self._owed += [Metric(tag, value, now, told.step) for tag, value in told.values.items()]
        late = time.monotonic() - self._sent > EVERY
        if late or len(self._owed) >= BATCH:
            self._send()

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Send the rest, and say how it ended."""
        self._send()
        if summary["status"] == FAILED:
            self._client.set_tag(self._id, "graft.error", str(summary.get("error"))[:5000])
        self._client.set_terminated(self._id, ENDS.get(summary["status"], "FINISHED"))

    def _experiment(self, name: str) -> str:
        found = self._client.get_experiment_by_name(name)
        if found is not None:
            return str(found.experiment_id)
        return str(self._client.create_experiment(name))

    def _send(self) -> None:
        self._sent = time.monotonic()
        while self._owed:
            self._client.log_batch(self._id, metrics=self._owed[:BATCH])
            del self._owed[:BATCH]
