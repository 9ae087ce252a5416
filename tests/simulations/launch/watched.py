"""What a run that goes on has said and recorded so far."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Watched:
    """The records of a run that goes on; also what its console says, and when."""

    folder: Path | None = None
    said: list[tuple[float, str]] = field(default_factory=list)

    def __call__(self, line: str) -> None:
        """Take a line of the run's output."""
        self.said.append((time.monotonic(), line))
        if line.startswith("run folder: "):
            self.folder = Path(line.removeprefix("run folder: "))

    def records(self, kind: str) -> list[dict[str, Any]]:
        """Steps or rounds, those written to the end."""
        path = self.folder and self.folder / "metrics.jsonl"
        text = path.read_text(encoding="utf-8") if path and path.exists() else ""
        records = [json.loads(line) for line in text.split("\n")[:-1]]
        return [record for record in records if record["kind"] == kind]

    def steps(self, client: str, round_number: int = 1) -> int:
        """How many steps of a client in a round are recorded."""
        steps = self.records("step")
        return sum(step["client"] == client and step["round"] == round_number for step in steps)
