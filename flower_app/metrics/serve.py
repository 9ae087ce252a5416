"""Where Prometheus asks for metrics: `runtime.metrics_port` of the ServerApp's process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from prometheus_client import CollectorRegistry, Gauge, ProcessCollector, start_http_server

from conf.rules import ConfigError


def new_registry(device: str = "cpu") -> CollectorRegistry:
    """Return a registry with what the process takes: CPU, memory, and of a GPU's memory, if any."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    if torch.device(device).type == "cuda":
        gauge = Gauge(
            "graft_gpu_memory_bytes",
            "Memory of the trunk's GPU that tensors take: now, and at most so far.",
            ["when"],
            registry=registry,
        )
        gauge.labels("now").set_function(lambda: torch.cuda.memory_allocated(device))
        gauge.labels("peak").set_function(lambda: torch.cuda.max_memory_allocated(device))
    return registry


@contextmanager
def served(registry: CollectorRegistry, host: str, port: int) -> Iterator[str]:
    """Serve a registry's metrics over HTTP; yields where.

    Raises
    ------
    ConfigError
        If nothing can listen there.
    """
    try:
        server, thread = start_http_server(port, addr=host, registry=registry)
    except OSError as error:
        raise ConfigError(
            f"runtime.metrics_port={port}: nothing can listen on {host}:{port} "
            f"({error.strerror or error}); choose a free port, an address of this machine "
            "(runtime.metrics_host), or port 0 for no metrics",
            key="runtime.metrics_port",
        ) from error
    try:
        yield f"http://{host}:{server.server_port}/metrics"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
