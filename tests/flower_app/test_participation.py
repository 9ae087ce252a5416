"""Who takes part: cohorts, stragglers, deaths in mid-round, quorum and retries, newcomers.

The clients are the real ClientApp and train through a real TrunkService over gRPC.
"""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.supercore.task_identity import TaskIdentity
from safetensors.torch import load_file

from conf.schema import Config, LinkConfig
from flower_app.runs.history import read_history
from flower_app.runs.resume import take_up
from strategies.errors import TrunkError
from strategies.rounds.splitfed import SplitFed
from strategies.transport.stream.link import GrpcLink
from strategies.transport.tickets import Ticket, new_key
from tests.flower_app import test_app
from tests.flower_app.grid import InProcessGrid, WatchedLink

FAST = "train.rounds=1 federation.fraction_evaluate=0 link.grace=0.2 train.lr=0.01"


@pytest.fixture(autouse=True)
def _flower_task(one_thread: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    monkeypatch.setattr("flower_app.client.site.GrpcLink", WatchedLink)


def configured(tmp_path: Path, changes: str = "") -> Config:
    return test_app.tiny_config(tmp_path, f"{FAST} {changes}")


def run(config: Config, grid: InProcessGrid) -> tuple[Path, list[dict[str, Any]], str]:
    """The run folder, its rounds, and what was printed."""
    folder, metrics, lines = test_app.run(config, grid)
    return folder, [m for m in metrics if m["kind"] == "round"], "\n".join(lines)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def equal(one: Path, other: Path) -> bool:
    left, right = weights(one), weights(other)
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def test_a_client_that_dies_in_mid_round_leaves_nothing_behind(tmp_path: Path) -> None:
    """Its partial replica is discarded: the result is that of the run without it, bitwise."""
    config = configured(tmp_path, "train.rounds=2")
    dying = InProcessGrid(clients=3, dying={2: 2})

    folder, rounds, text = run(config, dying)
    without, _, _ = run(config, InProcessGrid(clients=3, present={0, 1}))
    everyone, _, _ = run(config, InProcessGrid(clients=3))

    assert equal(folder, without)
    assert not equal(folder, everyone)
    for record in rounds[1:]:
        assert record["asked"] == ["client-0", "client-1", "client-2"]
        assert record["clients"] == ["client-0", "client-1"]
        why = record["missing"]["client-2"]
        assert why.startswith("its stream broke after step 2 of 3 and no answer came within ")
    assert "clients 2 of 3: client-0, client-1 | missing: client-2 (its stream broke" in text
    assert summary(folder)["dropped"] == {"client-2": 2}
    history = read_history(folder)
    places = [(asked["round"], asked["training"]) for asked in history.asked]
    assert places == [(1, True), (2, True)]
    assert {tuple(asked["clients"]) for asked in history.asked} == {tuple(rounds[1]["asked"])}
    for record in rounds[1:]:
        told = [a for a in history.answered if a["training"] and a["round"] == record["round"]]
        assert {a["client"] for a in told if not a["why"]} == set(record["clients"])
        assert {a["client"]: a["why"] for a in told if a["why"]} == record["missing"]
    assert all(record["memory"]["server_peak_mb"] > 100 for record in rounds)


def test_a_dead_client_is_not_waited_for_until_the_deadline(tmp_path: Path) -> None:
    """The default deadline is an hour."""
    config = configured(tmp_path)
    assert config.federation.round_timeout == 3600

    _, rounds, _ = run(config, InProcessGrid(clients=2, dying={0: 0}))

    assert rounds[-1]["seconds"] < 60
    assert "after step 0 of 3" in rounds[-1]["missing"]["client-0"]


@pytest.mark.parametrize("strategy", ["splitfed-v1", "splitfed-v2"])
def test_a_round_without_quorum_is_undone_and_tried_again(strategy: str, tmp_path: Path) -> None:
    """The result is, bitwise, that of the run in which nobody failed; metrics count once."""
    changes = (
        f"train.strategy={strategy} train.rounds=3 federation.quorum=1 federation.retries=1 "
        "train.optimizer=sgd train.momentum=0.9"
    )
    config = configured(tmp_path, changes)
    grid = InProcessGrid(clients=2)

    def die_once(message: Any) -> None:
        if message.metadata.message_type == "train":
            number = message.content.config_records["ticket"]["round"]
            first = sum(m.metadata.message_type == "train" for m in grid.seen) <= 4
            grid.dying = {1: 1} if number == 2 and first else {}

    grid.meanwhile = die_once
    folder, rounds, text = run(config, grid)
    smooth, smooth_rounds, _ = run(config, InProcessGrid(clients=2))

    assert equal(folder, smooth)
    assert [record.get("attempts", 1) for record in rounds] == [1, 1, 2, 1]
    (undone,) = rounds[2]["abandoned"]
    assert undone["asked"] == ["client-0", "client-1"]
    assert undone["clients"] == ["client-0"]
    assert "after step 1 of 3" in undone["missing"]["client-1"]
    assert (rounds[2]["clients"], rounds[2]["missing"]) == (["client-0", "client-1"], {})
    assert "attempt 1 had no quorum, missing: client-1 (its stream" in text
    for key in ("tokens", "bytes_up", "train"):
        assert [r[key] for r in rounds] == [r[key] for r in smooth_rounds]
    assert summary(folder)["tokens"] == summary(smooth)["tokens"]
    assert summary(folder)["dropped"] == {"client-1": 1}
    steps = [m for m in map(json.loads, (folder / "metrics.jsonl").open()) if m["kind"] == "step"]
    marked = [step for step in steps if step.get("attempt")]
    history = read_history(folder)
    assert len(history.steps) == 3 * 2 * 3, "those of the attempt that was undone do not count"
    tried = [(a["round"], a["attempt"]) for a in history.asked if a["training"]]
    assert tried == [(1, 1), (2, 1), (2, 2), (3, 1)]
    assert {(m["round"], m["attempt"]) for m in marked} == {(2, 2)}
    assert len(marked) == 6


def test_the_cohort_of_another_attempt_avoids_those_who_were_just_lost(tmp_path: Path) -> None:
    changes = "federation.fraction_train=0.5 federation.quorum=1 federation.retries=1"
    config = configured(tmp_path, f"{changes} federation.round_timeout=1")
    grid = InProcessGrid(clients=4)

    def die_at_first(message: Any) -> None:
        if message.metadata.message_type == "train":
            trained = sum(m.metadata.message_type == "train" for m in grid.seen)
            grid.absent = {grid._number(message)} if trained <= 2 else set()

    grid.meanwhile = die_at_first
    _, rounds, _ = run(config, grid)

    (undone,) = rounds[1]["abandoned"]
    assert len(undone["missing"]) == len(rounds[1]["clients"]) == 2
    assert not set(undone["asked"]) & set(rounds[1]["asked"])


def test_without_quorum_and_retries_the_run_ends_and_says_why(tmp_path: Path) -> None:
    config = configured(tmp_path, "federation.quorum=0.6 federation.retries=1")

    grid = InProcessGrid(clients=3, dying={2: 1})

    def kill(message: Any) -> None:
        grid.broken = {1} if message.metadata.message_type == "train" else set()

    grid.meanwhile = kill
    with pytest.raises(RuntimeError) as caught:
        run(config, grid)

    text = str(caught.value)
    assert "quorum=0.6 of 3 clients is 2, 1 answered (client-0)" in text
    assert "client-1: the process was killed; client-2: its stream broke after step 1 of 3" in text
    assert "attempt 2 of 2" in text


def test_a_quorum_that_holds_lets_the_round_go_on(tmp_path: Path) -> None:
    config = configured(tmp_path, "federation.quorum=0.6 federation.retries=1")

    _, rounds, _ = run(config, InProcessGrid(clients=3, dying={2: 1}))

    assert rounds[-1]["clients"] == ["client-0", "client-1"]
    assert "attempts" not in rounds[-1]


def test_a_round_ends_without_the_straggler_whose_late_reply_harms_nobody(tmp_path: Path) -> None:
    """One more than needed is asked. The straggler begins when its round is over, and its late
    reply is there during the next one."""
    changes = "train.rounds=3 federation.fraction_train=0.5 federation.oversample=0.5"
    config = configured(tmp_path, f"{changes} link.grace=30")
    event = threading.Event()
    grid = InProcessGrid(clients=4)
    straggler: list[int] = []

    def wake_up(message: Any) -> None:
        """The straggler gets to work, and answers, when the second round has begun."""
        trains = message.metadata.message_type == "train"
        if trains and message.content.config_records["ticket"]["round"] == 2 and grid.held:
            grid.held = {}
            event.set()
            grid.threads[0].join(30)

    choose_held(grid, straggler, event)
    grid.meanwhile = wake_up
    folder, rounds, text = run(config, grid)

    first = rounds[1]
    name = f"client-{straggler[0]}"
    assert (len(first["asked"]), len(first["clients"])) == (3, 2)
    assert first["missing"] == {name: "not needed: 2 of 3 answered first"}
    assert f"clients 2 of 3: {', '.join(first['clients'])}" in text
    late = [reply for reply in grid._replies.values() if reply.has_content()]
    errors = {reply.content.config_records["outcome"]["error"] for reply in late}
    assert any("no session is open to this token" in str(error) for error in errors)
    for record in rounds[2:]:
        assert len(record["clients"]) == 2
        assert set(record["missing"].values()) == {"not needed: 2 of 3 answered first"}
    assert sum(summary(folder)["dropped"].values()) == 3


def choose_held(grid: InProcessGrid, straggler: list[int], event: threading.Event) -> None:
    """Hold the first node that is asked to train."""
    push = grid.push_messages

    def pushing(messages: Any) -> Any:
        first = messages[0]
        if first.metadata.message_type == "train" and not straggler:
            straggler.append(grid._number(first))
            grid.held = {straggler[0]: event}
        return push(messages)

    grid.push_messages = pushing  # type: ignore[method-assign]


def test_a_straggler_that_is_training_is_stopped_and_counts_for_nothing(tmp_path: Path) -> None:
    """Two of three are needed; the third has taken a step when they have answered."""
    config = configured(
        tmp_path, "federation.fraction_train=0.67 federation.oversample=0.5 federation.quorum=1"
    )
    grid, at_work, go_on = InProcessGrid(clients=3), threading.Event(), threading.Event()
    begin = threading.Event()
    begin.set()
    grid.held = {0: begin}

    def dawdle(step: int) -> None:
        if step == 1:
            at_work.set()
            go_on.wait(30)

    grid.before_step = {0: dawdle}

    def after_its_first_step(message: Any) -> None:
        if message.metadata.message_type == "train" and grid._number(message) > 0:
            assert at_work.wait(30)

    grid.meanwhile = after_its_first_step
    folder, rounds, _ = run(config, grid)
    go_on.set()
    grid.threads[0].join(30)
    others, _, _ = run(configured(tmp_path), InProcessGrid(clients=3, present={1, 2}))

    assert rounds[-1]["missing"] == {"client-0": "not needed: 2 of 3 answered first"}
    assert equal(folder, others)
    (reply,) = grid._replies.values()
    assert "the trunk at" in str(reply.content.config_records["outcome"]["error"])


def test_a_node_that_joins_later_is_asked_and_takes_part(tmp_path: Path) -> None:
    config = configured(tmp_path, "train.rounds=3")
    grid = InProcessGrid(clients=3, present={0, 1})

    def join(message: Any) -> None:
        if message.metadata.message_type == "train":
            grid.present = {0, 1, 2}

    grid.meanwhile = join
    _, rounds, _ = run(config, grid)

    two, three = ["client-0", "client-1"], ["client-0", "client-1", "client-2"]
    assert [record["clients"] for record in rounds] == [[], two, three, three]
    queries = [m.metadata.dst_node_id for m in grid.seen if m.metadata.message_type == "query"]
    assert queries == [100, 101, 102]


def test_two_nodes_of_one_name_are_not_both_drawn(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    grid = InProcessGrid(clients=3)
    grid.node_configs = {
        n: {"partition-id": n, "num-partitions": 3, "name": name}
        for n, name in enumerate(["north", "south", "north"])
    }

    _, rounds, _ = run(configured(tmp_path), grid)

    assert rounds[-1]["asked"] == ["north", "south"]
    assert "node 102 does not take part: it is called 'north' like node 100" in caplog.text


def test_an_answer_under_another_name_is_not_believed(tmp_path: Path) -> None:
    grid = InProcessGrid(clients=2)
    deliver = grid._deliver

    def renamed(message: Any) -> Any:
        reply = deliver(message)
        if message.metadata.message_type == "train" and message.metadata.dst_node_id == 101:
            assert reply is not None
            reply.content.config_records["outcome"]["client"] = "client-0"
        return reply

    grid._deliver = renamed  # type: ignore[method-assign]
    _, rounds, _ = run(configured(tmp_path), grid)

    assert rounds[-1]["clients"] == ["client-0"]
    assert "it answers as 'client-0'" in rounds[-1]["missing"]["client-1"]


def test_weighted_sampling_counts_the_clients_examples(tmp_path: Path) -> None:
    """Of three sites the one with nearly all of the data is nearly always drawn."""
    changes = (
        "federation.sampling=weighted federation.fraction_train=0.34 federation.min_clients=1 "
        "train.rounds=6 train.local_steps=1 data.max_examples=0"
    )
    config = configured(tmp_path, changes)
    grid = InProcessGrid(clients=3)
    lines = (tmp_path / "texts.jsonl").read_text(encoding="utf-8").splitlines()
    for number, count in enumerate((2, 2, 40)):
        own = tmp_path / f"{number}.jsonl"
        own.write_text("\n".join(lines[:count]), encoding="utf-8")
        grid.node_configs[number] = {"data-path": str(own), "name": f"site-{number}"}

    _, rounds, _ = run(config, grid)

    drawn = [record["clients"][0] for record in rounds[1:]]
    assert drawn.count("site-2") >= 5


def test_a_node_that_lost_its_key_is_asked_anew_and_takes_part_again(tmp_path: Path) -> None:
    """Its SuperNode was started anew in mid-run: what it kept is gone, its key too."""
    grid = InProcessGrid(clients=2)

    def forget(message: Any) -> None:
        ticket = message.content.config_records["ticket"]
        if (message.metadata.message_type, ticket["round"]) == ("train", 2):
            grid.states.pop(1, None)

    grid.meanwhile = forget
    _, rounds, _ = run(configured(tmp_path, "train.rounds=3"), grid)

    assert rounds[2]["clients"] == ["client-0"]
    assert "has lost the key that its ticket was made for" in rounds[2]["missing"]["client-1"]
    assert rounds[3]["clients"] == ["client-0", "client-1"]


def test_a_ticket_copied_on_its_way_opens_nothing(tmp_path: Path) -> None:
    """Row 26, through both apps: a thief reads every message to clients and is first to come."""
    grid, refused = InProcessGrid(clients=2), list[str]()

    def steal(message: Any) -> None:
        record = message.content.config_records["ticket"]
        if message.metadata.message_type != "query":
            with pytest.raises(TrunkError) as error:
                GrpcLink(Ticket.from_record(record), new_key(), steps=3, config=LinkConfig())
            refused.append(error.value.kind)

    grid.meanwhile = steal
    folder, rounds, _ = run(configured(tmp_path), grid)
    calm, _, _ = run(configured(tmp_path), InProcessGrid(clients=2))

    assert len(refused) >= 2
    assert set(refused) == {"refused"}
    assert rounds[-1]["clients"] == ["client-0", "client-1"]
    assert equal(folder, calm)


def test_an_evaluation_that_fails_undoes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The only client that evaluates fails in round 1: it is recorded, kept, and gone on from."""
    config = configured(
        tmp_path,
        "train.rounds=2 federation.fraction_evaluate=1 output.checkpoint_every=1",
    )
    grid = InProcessGrid(clients=2)

    def fail(message: Any) -> None:
        evaluates = message.metadata.message_type == "evaluate"
        number = message.content.config_records["ticket"]["round"]
        grid.broken = {0, 1} if evaluates and number in (0, 1) else set()

    grid.meanwhile = fail
    folder, rounds, text = run(config, grid)

    assert [record["round"] for record in rounds] == [0, 1, 2]
    assert [record["evaluate"] is None for record in rounds] == [True, True, False]
    assert rounds[1]["train"] is not None
    assert set(rounds[1]["evaluation"]["missing"]) == {"client-0", "client-1"}
    assert "the process was killed" in text
    assert (folder / "checkpoints" / "round-0001").is_dir()
    assert "round 1 is not evaluated: client-0: the process was killed" in caplog.text


def test_a_run_stops_between_rounds_when_it_is_asked_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Flower 1.43 asks; the last round is kept although none was due."""
    start = SplitFed.start
    monkeypatch.setattr(
        SplitFed, "start", lambda self, **given: start(self, **given, should_stop=lambda: True)
    )
    config = configured(tmp_path, "train.rounds=3 output.checkpoint_every=3")

    folder, rounds, text = run(config, InProcessGrid(clients=2))

    assert [record["round"] for record in rounds] == [0, 1]
    assert (folder / "checkpoints" / "round-0001").is_dir()
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    told = json.loads(lines[-1])
    del told["time"]
    assert told == {"kind": "stop", "round": 1, "rounds": 3}
    assert json.loads((folder / "summary.json").read_text())["status"] == "stopped"
    assert "stops after round 1 of 3: as it was asked to" in text
    assert take_up(str(folder)).number == 1
