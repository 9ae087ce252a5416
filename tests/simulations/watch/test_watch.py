"""`graft watch` shows what a run's folder tells, and nothing else."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from flower_app.runs.folders import RunLock
from flower_app.runs.history import Follower
from simulations.watch import watch as module
from simulations.watch.frame import Frame, choose, step_losses
from simulations.watch.spark import bar, duration, size, spark
from simulations.watch.state import State, state_of
from simulations.watch.watch import newest_run, watch
from simulations.watch.writer import memory_mb, writer_of
from tests.simulations.watch.story import BEGAN, Story

THREE = ("client-0", "client-1", "client-2")


@pytest.fixture
def story(tmp_path: Path) -> Story:
    return Story(tmp_path / "runs")


def read(story: Story, *, going: bool = True) -> State:
    lock = RunLock(story.folder) if going else None
    state = state_of(Follower(story.folder).poll(), story.now)
    if lock:
        lock.release()
    return state


def rendered(state: State, width: int = 120, height: int = 40) -> list[str]:
    console = Console(width=width, height=height, file=io.StringIO())
    with console.capture() as text:
        console.print(Frame(state))
    return text.get().splitlines()


def phases(state: State) -> dict[str, str]:
    return {client.name: client.phase for client in state.clients}


def test_each_client_is_where_its_last_record_says(story: Story) -> None:
    story.round(0, THREE)
    assert phases(read(story)) == dict.fromkeys(THREE, "answered")
    assert read(story).current is None

    story.ask(1, THREE, training=True)
    assert phases(read(story)) == dict.fromkeys(THREE, "asked")
    story.wait(2)
    story.step(1, "client-0", 4)
    story.answer(1, "client-1", "its stream broke", training=True)
    state = read(story)
    assert phases(state) == {"client-0": "training", "client-1": "missing", "client-2": "asked"}
    assert [(c.step, c.steps) for c in state.clients] == [(4, 10), (0, 0), (0, 0)]
    assert state.clients[1].why == "its stream broke"
    assert [c.last for c in state.clients] == [4.0, 4.0, 2.0]  # the last one when it evaluated
    for name in ("client-0", "client-2"):
        story.answer(1, name, training=True)
    story.ask(1, ("client-0", "client-2"), training=False)
    assert phases(read(story)) == {
        "client-0": "evaluating", "client-1": "not asked", "client-2": "evaluating",
    }  # fmt: skip


def test_a_second_attempt_forgets_what_the_first_one_did(story: Story) -> None:
    story.round(0, THREE)
    story.ask(1, THREE, training=True)
    story.step(1, "client-0", 10, loss=1.0)
    story.answer(1, "client-0", training=True)
    story.ask(1, THREE, training=True, attempt=2)
    state = read(story)
    assert phases(state) == dict.fromkeys(THREE, "asked")
    assert state.done == 0
    assert any("attempt 2" in note for note in state.notes)


def test_what_is_counted_is_what_the_records_hold(story: Story) -> None:
    story.round(0, THREE)
    story.round(1, THREE)
    story.ask(2, THREE, training=True)
    for step in (1, 2, 3):
        story.wait(1)
        story.step(2, "client-0", step)
    state = read(story)
    assert state.bytes_up == 2 * 10_000 + 3 * 1000
    assert state.bytes_down == 2 * 20_000 + 3 * 2000
    assert state.speed == pytest.approx((30 * 100 + 300) / 13)  # of training and evaluation
    first = state.clients[0]
    assert (first.bytes_up, first.bytes_down) == (13_000, 26_000)
    assert first.speed == pytest.approx(100)
    assert first.loss == pytest.approx((5 / 1.9 + 5 / 2.0 + 5 / 2.1 + 5 / 2.2 + 5 / 2.3) / 5)
    assert first.shares == pytest.approx({"bottom": 0.1, "network": 0.2, "trunk": 0.6, "top": 0.1})
    assert first.held_out == 2.5
    assert state.peak_mb == 700.0


def test_time_left_is_by_rounds_and_in_the_first_by_steps(story: Story) -> None:
    story.round(0, THREE)
    assert read(story).left is None
    story.ask(1, THREE, training=True)
    story.wait(2)
    for name in THREE:
        story.step(1, name, 5)
    assert read(story).left == pytest.approx(2 / 0.5 * 3 - 2)
    story.wait(6)
    for name in THREE:
        story.answer(1, name, training=True)
    story.ask(1, THREE, training=False)
    story.end(1, THREE, seconds=8.0)
    story.wait(1)
    assert read(story).left == pytest.approx(2 * 8 - 1)
    story.wait(30)  # a round that is late leaves those after it
    assert read(story).left == pytest.approx(8)
    assert read(story, going=False).left is None


def test_a_killed_run_is_told_from_one_that_goes(story: Story) -> None:
    story.round(0, THREE)
    lines = "\n".join(rendered(read(story)))
    assert "running" in lines
    assert "graft resume" not in lines
    lines = "\n".join(rendered(read(story, going=False)))
    assert "unfinished" in lines
    assert f"graft resume {story.folder.name}" in lines


def test_a_round_that_was_broken_off_is_not_shown_as_done(story: Story) -> None:
    story.round(0, THREE)
    story.round(1, THREE)
    story.ask(2, THREE, training=True)
    story.step(2, "client-0", 3)
    for going in (True, False):
        assert any(" 37% " in line for line in rendered(read(story, going=going)))  # 1.1 of 3


def test_the_training_loss_of_a_step_is_its_clients_mean(story: Story) -> None:
    """Clients whose losses differ, one after another, are no curve."""
    story.ask(1, THREE, training=True)
    for step in (1, 2):
        for number, name in enumerate(THREE):
            story.step(1, name, step, loss=3.0 - step + number)
    assert step_losses(read(story).history.steps) == [3.0, 2.0]


def test_the_servers_own_evaluation_is_shown_where_there_is_one(story: Story) -> None:
    """Though no client holds anything out."""
    for number in range(2):
        story.write(
            kind="round", round=number, train=None, evaluate=None, asked=[], clients=[], missing={},
            tokens=0, bytes_up=0, bytes_down=0, seconds=1.0, central={"loss": 5.0 - number},
        )  # fmt: skip
    (line,) = [line for line in rendered(read(story)) if "best" in line]
    assert " ".join(line.split()) == "central loss 5.0000 █▁ 4.0000 best 4.0000 in round 1"


def test_a_run_of_which_only_the_end_is_known_is_shown(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text('{"status": "failed", "error": "no data"}')
    console = Console(width=80, file=io.StringIO())
    with console.capture() as text:
        watch(str(tmp_path), once=True, interval=1, console=console)
    assert "failed: no data" in text.get()


def test_a_record_of_an_earlier_graft_is_shown(tmp_path: Path) -> None:
    """Its rounds say who answered and who did not, and not who was asked."""
    told = {
        "kind": "round", "round": 1, "train": {"loss": 4.0}, "evaluate": None, "clients": ["a"],
        "missing": {"b": "gone"}, "tokens": 9, "bytes_up": 1, "bytes_down": 1, "seconds": 2.0,
    }  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text(f"{json.dumps(told)}\n")
    state = state_of(Follower(tmp_path).poll(), BEGAN)
    assert phases(state) == {"a": "answered", "b": "missing"}


@pytest.mark.parametrize(("width", "height"), [(60, 20), (80, 24), (140, 50)])
def test_a_frame_fits_the_terminal_and_shows_who_matters(
    width: int, height: int, tmp_path: Path
) -> None:
    story, names = Story(tmp_path / "runs"), [f"client-{n}" for n in range(100)]
    story.round(0, names)
    story.ask(1, names, training=True)
    for name in names[:60]:
        story.step(1, name, 1)
    story.answer(1, "client-42", "a very long reason " * 20, training=True)
    story.wait(70)
    lines = rendered(read(story), width, height)
    assert len(lines) <= height
    assert max(len(line) for line in lines) <= width
    text = "\n".join(lines)
    assert "client-42  missing: a ver" in text
    (more,) = [line for line in lines if line.startswith("and ")]
    shown = sum(line.startswith("client-") for line in lines)
    assert more.startswith(f"and {100 - shown} more: ")


def test_who_is_missing_or_silent_comes_first(story: Story) -> None:
    story.round(0, THREE)
    story.ask(1, THREE, training=True)
    for name in THREE:
        story.wait(1)
        story.step(1, name, 1)
    story.answer(1, "client-2", "lost", training=True)
    shown, hidden = choose(read(story).clients, 2)
    assert [client.name for client in shown] == ["client-2"]
    shown, hidden = choose(read(story).clients, 3)
    assert [client.name for client in (*shown, *hidden)] == list(THREE)


def test_an_earlier_grafts_record_is_shown_too(story: Story) -> None:
    lines = (story.folder / "metrics.jsonl").read_text().splitlines()
    story.round(0, THREE)
    story.round(1, THREE)
    text = (story.folder / "metrics.jsonl").read_text().splitlines()[len(lines) :]
    old = [line for line in text if '"kind": "step"' in line or '"kind": "round"' in line]
    (story.folder / "metrics.jsonl").write_text(
        "\n".join(line[: line.rindex(', "time"')] + "}" for line in old) + "\n"
    )
    state = read(story, going=False)
    assert phases(state) == dict.fromkeys(THREE, "answered")
    assert any("held-out loss 5.0000" in line for line in rendered(state))


class Stage:
    """Goes on with a story between two looks of `watch`, in place of sleeping."""

    def __init__(self, *acts: Callable[[], object]) -> None:
        self.acts = list(acts)

    def __call__(self, seconds: float) -> None:
        self.acts.pop(0)()


def shown(run: str, monkeypatch: pytest.MonkeyPatch, *acts: Callable[[], object]) -> str:
    stage = Stage(*acts)
    monkeypatch.setattr(module.time, "sleep", stage)
    console = Console(width=100, height=40, file=io.StringIO(), force_terminal=True)
    watch(run, once=False, interval=1, console=console)
    assert not stage.acts
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_it_follows_a_run_through_a_kill_and_a_resume_to_its_end(
    story: Story, monkeypatch: pytest.MonkeyPatch
) -> None:
    locks = [RunLock(story.folder)]
    story.round(0, THREE)

    def resume() -> None:
        locks.append(RunLock(story.folder))
        story.write(kind="resume", round=0)
        story.round(1, THREE)

    def end() -> None:
        story.summary("finished", tokens_per_second=100.0)
        locks[-1].release()

    text = shown(str(story.folder), monkeypatch, locks[0].release, resume, end)
    places = [text.index(word) for word in ("running", "unfinished", "resumed after", "mfinished")]
    assert places == sorted(places)
    assert "100%" in text[places[-1] :]


def test_ctrl_c_leaves_the_run_alone_and_says_so(
    story: Story, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = RunLock(story.folder)

    def interrupt() -> None:
        raise KeyboardInterrupt

    text = shown(str(story.folder), monkeypatch, interrupt)
    assert "the run goes on without being watched" in text
    lock.release()


def test_the_newest_run_that_goes_is_shown_else_the_newest(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no run under .*graft demo"):
        newest_run(tmp_path)
    old, mid, new = (Story(tmp_path, name=f"2026010{day}-120000-demo") for day in (1, 2, 3))
    new.summary("finished")
    assert newest_run(tmp_path) == new.folder
    locks = [RunLock(story.folder) for story in (old, mid)]
    assert newest_run(tmp_path) == mid.folder
    for lock in locks:
        lock.release()


def test_the_process_that_writes_a_run_is_found_by_its_lock(story: Story) -> None:
    if not os.access("/proc/locks", os.R_OK):
        pytest.skip("this system has no /proc/locks")
    assert writer_of(story.folder) is None
    lock = RunLock(story.folder)
    assert writer_of(story.folder) == os.getpid()
    assert memory_mb(os.getpid()) > 10  # type: ignore[operator]
    lock.release()
    assert writer_of(story.folder, story.folder / "no locks") is None


def test_clients_that_train_one_after_the_other_have_one_curve(story: Story) -> None:
    story.round(0, THREE)
    story.ask(1, THREE, training=True)
    for name in THREE:
        for step in range(1, 9):
            story.step(1, name, step)
    (line,) = [line for line in rendered(read(story)) if line.startswith("train loss")]
    assert line.split()[3] == "█▇▅▄▃▂▂▁"


def test_numbers_as_text() -> None:
    assert spark([3, 2, 1], 10) == "█▅▁"
    assert spark([1, 1, 5, 5], 2) == "▁█"
    assert spark([], 10) == ""
    assert spark([2.0], 10) == "▁"
    assert bar(0.5, 4) == "━━──"
    assert [duration(s) for s in (None, 3.4, 65, 3605)] == ["-", "3 s", "1:05", "1:00:05"]
    assert [size(n) for n in (12, 1500, 2.5e6, 3e9)] == ["12 B", "1.5 kB", "2.5 MB", "3 GB"]
