"""The tab of the chat: messages, the box to write in, controls, and live figures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import gradio as gr

from simulations.ui import live, turns
from simulations.ui.answer import Shown, answer, sampling_of
from simulations.ui.chats import Chats
from simulations.ui.talked import Talked

QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
AT_ONCE = 8
"""Answers that are made at once; further ones wait."""
MOST_TOKENS = 2048


@dataclass(frozen=True, kw_only=True)
class _Parts:
    """What is on the tab."""

    chat: gr.Chatbot
    box: gr.Textbox
    send: gr.Button
    stop: gr.Button
    notice: gr.HTML
    figures: gr.HTML
    system: gr.Textbox
    controls: list[gr.components.Component]

    @property
    def asked(self) -> list[gr.components.Component]:
        return [self.chat, self.system, *self.controls]

    @property
    def shown(self) -> list[gr.components.Component]:
        return [self.chat, self.notice, self.figures, self.send, self.stop]


def build(talked: Talked, chats: Chats) -> None:
    """Lay the tab out and wire it; called within the page."""
    with gr.Row(equal_height=False, elem_classes="chat-row"):
        with gr.Column(scale=3, min_width=300, elem_classes="talk"):
            chat = _messages(talked)
            notice = gr.HTML("", elem_id="notice")
            box, send, stop = _box(talked)
            with gr.Row(elem_classes="after"):
                retry = gr.Button("Retry", size="sm", elem_id="retry", min_width=80)
                undo = gr.Button("Undo", size="sm", elem_id="undo", min_width=80)
                clear = gr.Button("Clear", size="sm", elem_id="clear", min_width=80)
        with gr.Column(scale=1, min_width=280, elem_classes="side"):
            figures = gr.HTML(_no_figures(talked), elem_id="figures")
            system, controls = _controls(talked)
    parts = _Parts(
        chat=chat, box=box, send=send, stop=stop, notice=notice, figures=figures, system=system,
        controls=controls,
    )  # fmt: skip
    _wire(parts, {"retry": retry, "undo": undo, "clear": clear}, talked, chats)


def _messages(talked: Talked) -> gr.Chatbot:
    chats = talked.speaker.prompts.chats
    hint = (
        "Write below to begin."
        if chats
        else "This model has no chat template: write the beginning of a text, and it goes on."
    )
    return gr.Chatbot(
        elem_id="chat",
        show_label=False,
        editable="all",
        buttons=["copy"],
        render_markdown=chats,
        allow_tags=False,
        group_consecutive_messages=False,
        placeholder=f"<p>{hint}</p>",
        height="max(20rem, calc(100dvh - 20.5rem))",
    )


def _box(talked: Talked) -> tuple[gr.Textbox, gr.Button, gr.Button]:
    what = "Your message" if talked.speaker.prompts.chats else "The beginning of a text"
    with gr.Row(equal_height=False, elem_classes="write"):
        box = gr.Textbox(
            label=what,
            show_label=False,
            container=False,
            placeholder=f"{what}: Enter sends, Shift-Enter begins a new line",
            lines=1,
            max_lines=8,
            autofocus=True,
            scale=5,
            min_width=160,
            elem_id="box",
        )
        send = gr.Button("Send", variant="primary", min_width=88, scale=0, elem_id="send")
        stop = gr.Button(
            "Stop", variant="stop", min_width=88, scale=0, elem_id="stop", visible=False
        )
    return box, send, stop


def _controls(talked: Talked) -> tuple[gr.Textbox, list[gr.components.Component]]:
    own, context = talked.speaker.defaults, talked.speaker.context
    most = min(MOST_TOKENS, context or MOST_TOKENS)
    system = gr.Textbox(
        label="System prompt",
        info="What the model is told before the chat begins.",
        lines=2,
        max_lines=8,
        visible=talked.speaker.prompts.chats,
        elem_id="system",
    )
    with gr.Accordion("How the answer is drawn", open=True, elem_id="sampling"):
        controls: list[gr.components.Component] = [
            gr.Slider(1, most, min(own.max_tokens, most), step=1, label="Max tokens",
                      info="New tokens at most.", elem_id="max-tokens"),
            gr.Slider(0, 2, own.temperature, step=0.05, label="Temperature",
                      info="0: always the likeliest token. Higher: more varied.",
                      elem_id="temperature"),
            gr.Slider(0.05, 1, own.top_p, step=0.05, label="Top-p",
                      info="Only the likeliest tokens that make up this much. 1: all.",
                      elem_id="top-p"),
            gr.Slider(0, 200, own.top_k, step=1, label="Top-k",
                      info="Only this many of the likeliest tokens. 0: all.", elem_id="top-k"),
            gr.Slider(1, 2, own.repetition_penalty, step=0.05, label="Repetition penalty",
                      info="Above 1: what is there already becomes less likely.",
                      elem_id="penalty"),
            gr.Textbox("", label="Seed", max_lines=1, placeholder="another each time",
                       info="A whole number: the same seed gives the same answer.",
                       elem_id="seed"),
        ]  # fmt: skip
    return system, controls


def _no_figures(talked: Talked) -> str:
    return live.figures(talked, live.Figures(), _load(talked), going=False)


def _load(talked: Talked) -> Any:
    return talked.load() if talked.load is not None else None


def _wire(parts: _Parts, buttons: dict[str, gr.Button], talked: Talked, chats: Chats) -> None:
    """Say what each key and button does."""
    stream = _stream(talked, chats)
    how: dict[str, Any] = {**QUIET, "concurrency_limit": AT_ONCE, "concurrency_id": "answers"}

    def sent(request: gr.Request, text: str, shown: Any, system: str, *controls: Any) -> Iterator:
        if not text.strip():
            yield [gr.skip()] * 6
            return
        asked = turns.ask(turns.read(shown), text)
        for views in stream(asked, system, controls, request):
            yield ["", *views]

    def retried(request: gr.Request, shown: Any, system: str, *controls: Any) -> Iterator:
        try:
            asked = turns.again(turns.read(shown))
        except ValueError as error:
            yield _told(error)
            return
        yield from stream(asked, system, controls, request)

    def edited(
        request: gr.Request, event: gr.EditData, shown: Any, system: str, *controls: Any
    ) -> Iterator:
        try:
            left, ask = turns.edited(turns.read(shown), _place(event.index), str(event.value))
        except ValueError as error:
            yield _told(error)
            return
        if ask:
            yield from stream(left, system, controls, request)
        else:
            yield [left, live.notice("Your words stand in place of the answer."), *[gr.skip()] * 3]

    with_box = [parts.box, *parts.shown]
    gr.on([parts.box.submit, parts.send.click], sent, [parts.box, *parts.asked], with_box, **how)
    buttons["retry"].click(retried, parts.asked, parts.shown, **how)
    parts.chat.edit(edited, parts.asked, parts.shown, **how)
    _wire_rest(parts, buttons, talked, chats)


def _wire_rest(parts: _Parts, buttons: dict[str, gr.Button], talked: Talked, chats: Chats) -> None:
    """What makes no answer."""

    def stopped(request: gr.Request) -> None:
        chats.stop(str(request.session_hash))

    def undone(request: gr.Request, shown: Any) -> list[Any]:
        chats.leave(str(request.session_hash))
        try:
            left, text = turns.undone(turns.read(shown))
        except ValueError as error:
            return [gr.skip(), *_told(error)]
        return [text, left, "", gr.skip(), *_buttons(going=False)]

    def cleared(request: gr.Request) -> list[Any]:
        chats.free(str(request.session_hash))
        return ["", [], "", _no_figures(talked), *_buttons(going=False)]

    apart: dict[str, Any] = {**QUIET, "concurrency_limit": None}
    parts.stop.click(stopped, None, None, **apart)
    buttons["undo"].click(undone, [parts.chat], [parts.box, *parts.shown], **apart)
    buttons["clear"].click(cleared, None, [parts.box, *parts.shown], **apart)


def _stream(talked: Talked, chats: Chats) -> Callable[..., Iterator[list[Any]]]:
    """What answers messages and shows it while it grows."""

    def stream(
        asked: turns.Messages, system: str | None, controls: Any, request: gr.Request
    ) -> Iterator[list[Any]]:
        try:
            sampling = sampling_of(controls)
        except ValueError as error:
            yield [asked, *_told(error)[1:]]
            return
        chat = chats.of(str(request.session_hash))
        for shown in answer(talked, chat, asked, system or "", sampling):
            yield _views(talked, shown)

    return stream


def _place(index: int | tuple[int, int]) -> int:
    return index if isinstance(index, int) else index[0]


def _views(talked: Talked, shown: Shown) -> list[Any]:
    return [
        shown.messages,
        live.notice(shown.words, failed=shown.failed),
        live.figures(talked, shown.figures, _load(talked), going=shown.going),
        *_buttons(going=shown.going),
    ]


def _buttons(*, going: bool) -> list[Any]:
    return [gr.Button(visible=not going), gr.Button(visible=going)]


def _told(error: Exception) -> list[Any]:
    return [gr.skip(), live.notice(str(error), failed=True), gr.skip(), *_buttons(going=False)]
