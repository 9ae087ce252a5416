"""What a run was computed with: versions, processor, memory, GPU."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from typing import Any

import psutil
import torch

from conf import VERSION
from strategies.memory import MEGABYTE


def describe_environment() -> dict[str, Any]:
    """Return what a run's record says of the software and the machine of its server.

    Returns
    -------
    dict
        Versions of `graft`, `python`, `torch`, `transformers`, `flwr` and `peft`; `platform`;
        `cpus` that this process may use; `memory_mb`, of a million bytes; `gpu`, its name or "".
    """
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    return {
        "graft": VERSION,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "flwr", "peft")},
        "platform": platform.platform(),
        "cpus": len(usable) if usable else os.cpu_count() or 1,
        "memory_mb": round(psutil.virtual_memory().total / MEGABYTE),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "",
    }
