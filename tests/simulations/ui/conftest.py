"""One browser and one server for the tests of a module; a page of its own for each test."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.simulations.ui.fake import FakeSpeaker

CHROMIUM = Path("/usr/bin/chromium")
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"


@dataclass
class Served:
    """A page that is served, and what stands behind it."""

    address: str
    speaker: FakeSpeaker
    chats: Any
    folder: Path
    outside: list[str] = field(default_factory=list)
    """Requests that went elsewhere."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")
    if not CHROMIUM.exists():
        pytest.skip(f"no {CHROMIUM}: apt-get install chromium")
    with api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=str(CHROMIUM), args=list(FLAGS))
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    yield from serve(tmp_path_factory.mktemp("home") / "runs")


def serve(folder: Path, *, password: str | None = None) -> Iterator[Served]:
    pytest.importorskip("gradio", reason="no gradio: pip install 'graft[ui]'")
    from simulations.ui import bind, page, server
    from simulations.ui.chats import Chats
    from simulations.ui.shelf import Shelf
    from simulations.ui.talked import Load, Talked

    speaker, chats = FakeSpeaker(), Chats()
    talked = Talked(
        speaker=speaker,
        description="llama of 6 blocks, cut 1 + 1",
        trunk="trunk.example:9090",
        load=lambda: Load(sessions=2, kv_mib=1.5),
    )
    listening = bind.listen(bind.Bind(port=0))
    app = server.make(page.build(talked, chats, Shelf(folder)), loopback=True, password=password)
    uvicorn = server.serve(app, listening)
    thread = threading.Thread(target=lambda: uvicorn.run(sockets=[listening]), daemon=True)
    thread.start()
    wait(lambda: uvicorn.started)
    address = f"http://127.0.0.1:{listening.getsockname()[1]}"
    yield Served(address=address, speaker=speaker, chats=chats, folder=folder)
    uvicorn.should_exit = True
    thread.join(10)


@pytest.fixture(scope="module")
def light(browser: Any) -> Iterator[Any]:
    """A browser's profile, so that what was fetched for one test need not be for the next."""
    context = browser.new_context(viewport={"width": 1280, "height": 860})
    yield context
    context.close()


@pytest.fixture
def tab(light: Any, served: Served) -> Iterator[Any]:
    yield from open_tab(light, served)


def open_tab(context: Any, served: Served) -> Iterator[Any]:
    """A page on what is served; fails if it asks anybody else for anything."""
    vars(served.speaker).update(vars(FakeSpeaker()))
    context.set_default_timeout(30_000)
    page = context.new_page()
    page.on("request", lambda request: served.outside.append(request.url))
    page.goto(served.address)
    page.wait_for_selector("#box textarea, input[type=password]")
    yield page
    page.close()
    own = (served.address, "data:", "blob:")
    assert [url for url in served.outside if not url.startswith(own)] == []


def wait(met: Any, seconds: float = 20.0) -> None:
    """Until a condition is met; fails if it is not."""
    end = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.02)
