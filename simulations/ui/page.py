"""The page: who is talked to, a tab with the chat, and one with the runs."""

from __future__ import annotations

import gradio as gr

from simulations.ui import chat_tab, live, runs_tab
from simulations.ui.chats import Chats
from simulations.ui.shelf import Shelf
from simulations.ui.talked import Talked


def build(talked: Talked | None, chats: Chats, shelf: Shelf) -> gr.Blocks:
    """Return the page; without a model it shows the runs alone."""
    with gr.Blocks(title="Graft", analytics_enabled=False, fill_width=True) as page:
        gr.HTML(live.header(talked), elem_id="who")
        with gr.Tabs(selected="chat" if talked else "runs"):
            if talked is not None:
                with gr.Tab("Chat", id="chat"):
                    chat_tab.build(talked, chats)
            with gr.Tab("Runs", id="runs"):
                runs_tab.build(shelf)

        def left(request: gr.Request) -> None:
            chats.free(str(request.session_hash))

        page.unload(left)
    return page
