"""`runtime`: Threads and devices, and where a run may be looked at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from conf import rules
from conf.rules import setting
from conf.sections.base import Section


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig(Section):
    """Threads and devices; one thread each is fastest if trunk and clients share a machine."""

    section: ClassVar[str] = "runtime"

    client_threads: int = setting(1, rules.COUNT_OR_ZERO)
    """torch threads of a client process; 0: torch's own choice."""
    trunk_threads: int = setting(1, rules.COUNT_OR_ZERO)
    client_device: str = setting("cpu", rules.DEVICE)
    trunk_device: str = setting("cpu", rules.DEVICE)
    metrics_port: int = setting(0, rules.PORT_OR_ZERO)
    """Of the ServerApp's metrics for Prometheus; 0: none are kept."""
    metrics_host: str = setting("127.0.0.1", rules.NOT_EMPTY)
    """Address that serves them, in clear and to whoever asks."""
