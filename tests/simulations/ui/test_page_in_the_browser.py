"""The page around the chat in a real browser: who is let in, what leaves, how it fits, the runs."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.simulations.ui.conftest import Served, open_tab, serve

STARTED = "2026-01-01T12:00:00+00:00"


def _write_run(folder: Path, rounds: int, *, ended: bool) -> None:
    """A run of two clients as the recorder writes it, with losses that fall."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text("experiment: demo\ntrain: {rounds: 3}\n")
    lines: list[dict[str, Any]] = [{"kind": "start", "time": STARTED, "environment": {}}]
    for number in range(rounds + 1):
        for client in ("client-0", "client-1") if number else ():
            lines += [
                {"kind": "step", "round": number, "client": client, "step": step, "steps": 2,
                 "loss": 5 - number + step / 10, "tokens": 10, "bytes_up": 10, "bytes_down": 10,
                 "seconds": {"bottom": 0.1, "network": 0.1, "trunk": 0.2, "top": 0.1},
                 "time": f"2026-01-01T12:00:{10 * number + step:02}+00:00"}
                for step in (1, 2)
            ]  # fmt: skip
        lines.append(
            {"kind": "round", "round": number, "clients": ["client-0", "client-1"], "seconds": 5.0,
             "evaluate": {"loss": 5.0 - number}, "tokens": 40, "bytes_up": 40, "bytes_down": 40,
             "time": f"2026-01-01T12:00:{10 * number + 5:02}+00:00"}
        )  # fmt: skip
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    if ended:
        told = {"status": "finished", "experiment": "demo", "started": STARTED, "seconds": 30.0,
                "finished": "2026-01-01T12:00:35+00:00"}  # fmt: skip
        (folder / "summary.json").write_text(json.dumps(told), encoding="utf-8")


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    yield from serve(tmp_path_factory.mktemp("locked") / "runs", password="correct horse")


@pytest.fixture
def door(light: Any, locked: Served) -> Iterator[Any]:
    yield from open_tab(light, locked)


@pytest.fixture
def dark(browser: Any, served: Served) -> Iterator[Any]:
    context = browser.new_context(color_scheme="dark")
    yield from open_tab(context, served)
    context.close()


@pytest.mark.slow
def test_runs_appear_and_grow_while_the_page_is_open(tab: Any, served: Served) -> None:
    run = served.folder / "20260101-120000-demo"
    tab.get_by_role("tab", name="Runs").click()
    tab.wait_for_selector("#summary:has-text('No runs yet')")

    _write_run(run, 1, ended=False)
    tab.wait_for_selector("#losses .legendtext:has-text('held-out')")
    early = tab.locator("#summary").inner_text()
    _write_run(run, 3, ended=True)
    tab.wait_for_selector("#summary:has-text('finished after 3 of 3 rounds')")
    _write_run(served.folder / "20260102-120000-other", 2, ended=False)

    assert "5.0000 → 4.0000" in early
    assert "5.0000 → 2.0000" in tab.locator("#summary").inner_text()
    assert tab.locator("#clients .legendtext").all_text_contents() == ["client-0", "client-1"]
    assert "network" in tab.locator("#times .legendtext").all_text_contents()
    tab.get_by_text("tokens", exact=True).last.click()
    tab.wait_for_selector("#losses .xtitle:has-text('tokens trained on')")


def test_no_request_leaves_whatever_an_answer_names(tab: Any, served: Served) -> None:
    """The picture's host counts who asks it: nobody, though the answer is shown as Markdown."""
    asked: list[str] = []

    class Elsewhere(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)

    with HTTPServer(("127.0.0.1", 0), Elsewhere) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        served.speaker.words, served.speaker.most = f"![x]({address}/x.png) and **so** ", 1
        tab.fill("#box textarea", "show me")
        tab.keyboard.press("Enter")
        tab.wait_for_selector("#chat .bot strong")
        tab.wait_for_timeout(300)
        server.shutdown()
    blocked = [url for url in served.outside if url.startswith(address)]
    served.outside[:] = [url for url in served.outside if url not in blocked]

    assert asked == []


@pytest.mark.slow
@pytest.mark.parametrize("width", [400, 900])
def test_nothing_is_wider_than_the_window(dark: Any, served: Served, width: int) -> None:
    served.speaker.words = "w" * 300 + "\n\n```\n" + "c" * 300 + "\n```\n"
    dark.set_viewport_size({"width": width, "height": 800})
    dark.fill("#box textarea", "u" * 300)
    dark.keyboard.press("Enter")
    dark.wait_for_selector("#chat .bot pre")

    scrolled = "document.documentElement.scrollWidth"
    assert dark.evaluate(scrolled) <= width
    dark.get_by_role("tab", name="Runs").click()
    dark.wait_for_timeout(300)
    assert dark.evaluate(scrolled) <= width


@pytest.mark.slow
def test_light_and_dark_follow_the_system_and_can_be_read(tab: Any, dark: Any) -> None:
    for page, light in ((tab, True), (dark, False)):
        script = "s => getComputedStyle(document.querySelector(s))"
        ground = _luminance(page.evaluate(f"({script})('body').backgroundColor"))
        assert (ground > 0.5) is light
        for place in (".who h1", ".who .what", ".live dt", ".live dd", ".live h3"):
            ink = _luminance(page.evaluate(f"({script})('{place}').color"))
            high, low = max(ink, ground), min(ink, ground)
            assert (high + 0.05) / (low + 0.05) > 4.5, (place, light)


@pytest.mark.slow
def test_a_wrong_password_is_refused_and_the_right_one_opens(door: Any, locked: Served) -> None:
    refused = httpx.get(f"{locked.address}/config")
    name, word = door.locator("input").first, door.locator("input[type=password]")
    name.fill("graft")
    word.fill("wrong horse")
    word.press("Enter")
    door.wait_for_selector(":text('Incorrect Credentials')")
    still = door.locator("#box").count()
    name.fill("graft")
    word.fill("correct horse")
    word.press("Enter")
    door.wait_for_selector("#box textarea")

    assert refused.status_code == 401
    assert still == 0


def test_it_answers_to_no_name_but_this_machines(served: Served) -> None:
    """So that another site cannot have its own name point here."""
    answered = httpx.get(served.address, headers={"Host": "evil.example"})

    assert answered.status_code == 400
    assert httpx.get(served.address).headers["x-frame-options"] == "DENY"


def _luminance(colour: str) -> float:
    """Relative luminance of `rgb(r, g, b)`, as WCAG has it."""
    parts = [float(part) / 255 for part in colour.split("(")[1].strip(")").split(",")[:3]]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
