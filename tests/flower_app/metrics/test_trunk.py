"""A trunk's metrics without a run: what goes wrong is counted, what is open is told."""

from __future__ import annotations

import grpc
import pytest
import torch
from prometheus_client import CollectorRegistry, generate_latest

from conf.schema import TrainConfig
from flower_app.metrics.serve import new_registry
from flower_app.metrics.trunk import TrunkMetrics
from models import split
from strategies.errors import TrunkError
from tests.strategies.helpers import (
    CUT,
    H,
    admit,
    back,
    connect,
    engine_for,
    forward,
    served,
    tiny_model,
)
from tests.strategies.transport.stream.test_reconnect import cut
from tests.strategies.transport.stream.test_service import raw_call


def test_broken_streams_strangers_and_wrong_frames_are_counted(one_thread: None) -> None:
    registry = CollectorRegistry()
    metrics = TrunkMetrics(registry)
    engine = engine_for(split(tiny_model(), CUT).trunk, TrainConfig(), meter=metrics)
    metrics.attach(engine)
    engine.open_round(1, 1, training=True)

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"graft_trunk_{name}", labels)

    with served(engine, timeout=6.0) as service:
        link = connect(service, "a", 2, timeout=6.0)
        forward(link, 0, 0, H, None)
        assert value("sessions") == 1
        assert value("in_flight_bytes") == engine.in_flight.bytes > 0
        assert value("tokens_total") == H.shape[0] * H.shape[1]

        cut(link)
        back(link, 0, 0, torch.ones_like(H), last=True, tokens=4)
        assert (value("connections_total"), value("reconnects_total")) == (2, 1)
        assert value("work_seconds_count", work="backward") == 1

        with pytest.raises(grpc.RpcError):
            raw_call(service, [], admit(service, "b"), "x")
        assert value("refused_total") == 1

        with pytest.raises(TrunkError):
            forward(link, 1, 1, H, None)  # step 0 was not applied
        assert value("failures_total", kind="order") == 1
        link.abort()
    engine.close_round()
    assert value("sessions") == value("in_flight_bytes") == value("frames_in_progress") == 0


def test_a_gpus_memory_is_told_where_the_trunk_has_one() -> None:
    assert b"graft_gpu_memory_bytes" not in generate_latest(new_registry("cpu"))
    told = generate_latest(new_registry("cuda")).decode()
    assert 'graft_gpu_memory_bytes{when="now"}' in told
    assert 'graft_gpu_memory_bytes{when="peak"}' in told
