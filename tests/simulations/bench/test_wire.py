"""What `graft bench wire` measures: real sessions over a real relay, and how it is told."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from simulations.bench.frames import bench_frames
from simulations.bench.wire import CODECS, QUICK, WAYS, WINDOWS, Point, bench_wire, points_of
from simulations.bench.wire_plot import columns, plot
from strategies.transport.codec.registry import codecs

SMALL = {"blocks": 3, "hidden": 64, "vocabulary": 64, "batch": 2, "tokens": 16}
RTT = 0.04


@pytest.mark.slow
def test_points_over_networks(tmp_path: Path) -> None:
    """A step waits for each of its round trips: without the relay it takes a few milliseconds."""
    points = [
        Point(codec="fp32"),
        Point(rtt=RTT, bandwidth=1e8, codec="fp32", micros=2),
        Point(rtt=RTT, bandwidth=1e8, micros=2),
        Point(rtt=RTT, bandwidth=1e8, codec="fp32", micros=2, window=2),
    ]
    result = json.loads(json.dumps(bench_wire(points, 1, sizes=SMALL)))
    near, far_bf16, far, at_once = result["rows"]

    assert (near["network"], far["network"]) == ("loopback", "40 ms, 100 Mbit/s")
    assert (far["codec"], far_bf16["codec"]) == ("fp32", "bf16")
    assert far["network_seconds"] > 2 * RTT
    elements = 2 * 2 * SMALL["batch"] * SMALL["tokens"] * SMALL["hidden"]
    assert 4 * elements < far["bytes_up"] < 4.2 * elements + 1000
    assert far_bf16["bytes_up"] - far["bytes_up"] == pytest.approx(-2 * elements, abs=100)
    assert near["loss_difference"] < 1e-6 > far["loss_difference"] == at_once["loss_difference"]
    assert at_once["split_seconds"] < far["split_seconds"]  # 2 round trips and a bit, not 5
    names, rows = columns(result)
    assert {len(row) for row in rows} == {len(names)}
    assert [path.name for path in plot(result, tmp_path)] == ["wire.png"]
    result["rows"].append({**far, "rtt": 2 * RTT})
    assert [path.name for path in plot(result, tmp_path)] == ["wire.png", "wire-rtt.png"]


def test_points_that_are_asked_for() -> None:
    quick = {(point.rtt, point.bandwidth, point.micros) for point in QUICK}
    assert {(point.rtt, point.bandwidth, point.micros) for point in points_of(False)} == quick
    assert len(points_of(False)) == len(WAYS) * len(QUICK)
    assert len(points_of(False, codecs=["fp32", "bf16"], windows=[2])) == 2 * len(QUICK)
    some = points_of(False, rtts=[0.0, 0.1], micros=[1, 8], windows=[1, 8])
    assert {(point.rtt, point.micros, point.window) for point in some} == {
        *itertools.product((0.0, 0.1), (1, 8), (1, 8))
    }
    assert len(points_of(True)) == 5 * 3 * 3 * len(CODECS) * len(WINDOWS)


def test_frames_and_codecs_are_timed() -> None:
    result = bench_frames(0.1, 1)
    assert set(codecs()) <= set(result)
    assert result["bf16"]["bits_per_element"] == 16
    assert result["frame_build_ms"] > 0 < result["frame_read_ms"]
