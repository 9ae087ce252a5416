"""The figures beside an answer while it grows, as HTML."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from simulations.talk.stats import PARTS, Figures
from simulations.ui.talked import Load, Talked

NONE = "–"
PLACES = {
    "bottom": "here: embeddings and first blocks",
    "network": "the way to the trunk and back",
    "trunk": "the middle blocks, on the server",
    "top": "here: last blocks, head and the draw",
}


def header(talked: Talked | None) -> str:
    """Return who is talked to, where its parts are, and what leaves this machine."""
    if talked is None:
        return (
            '<div class="who"><h1>No model yet</h1><p class="what">Train one with '
            "<code>graft demo</code>, or name one: <code>graft ui RUN_OR_MODEL</code>. "
            "Below are the runs, as they come.</p></div>"
        )
    where = "split" if talked.trunk else "whole"
    words = f"split, trunk at {talked.trunk}" if talked.trunk else "whole, on this machine"
    return (
        f'<div class="who"><h1>{escape(talked.speaker.name)}</h1>'
        f'<span class="badge {where}">{escape(words)}</span>'
        f'<p class="what">{escape(talked.description)}</p>'
        f'<p class="privacy">{escape(talked.privacy)}</p></div>'
    )


def figures(talked: Talked, shown: Figures, load: Load | None, *, going: bool) -> str:
    """Return what an answer takes, by part, and how busy the trunk is."""
    state = "while it answers" if going else "of the last answer" if shown.answers else "no answer"
    parts = [
        f'<div class="live" data-going="{str(going).lower()}">',
        f"<h2>Figures <small>{state}</small></h2>",
        _tiles(
            [
                ("tokens/s", _figure(shown.rate) if shown.tokens else NONE),
                ("ms per token", _figure(shown.ms) if shown.tokens else NONE),
                ("tokens", f"{shown.tokens:,}" if shown.answers else NONE),
                ("first token", _seconds(shown.first) if shown.tokens else NONE),
            ]
        ),
    ]
    if talked.trunk:
        parts += [_bar(shown), _crossed(shown), _load(load)]
    elif shown.answers:
        parts.append('<p class="note">The model is whole: nothing crosses a network.</p>')
    if shown.reused:
        parts.append(
            f'<p class="note">{shown.reused:,} of {shown.prompt:,} prompt tokens were still in the '
            "cache.</p>"
        )
    return "".join(parts) + "</div>"


def notice(words: str, *, failed: bool = False) -> str:
    """Return a line under the chat; empty: none."""
    if not words:
        return ""
    kind = "problem" if failed else "note"
    return f'<p class="{kind}" role="{"alert" if failed else "status"}">{escape(words)}</p>'


def _tiles(told: Iterable[tuple[str, str]]) -> str:
    cells = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in told)
    return f'<dl class="tiles">{cells}</dl>'


def _bar(shown: Figures) -> str:
    """Milliseconds per token by part: a bar, and the same in numbers."""
    ms = {part: shown.ms_of.get(part, 0.0) for part in PARTS}
    total = sum(ms.values())
    widths = {part: 100 * value / total if total else 0.0 for part, value in ms.items()}
    bar = "".join(f'<i class="{part}" style="width:{widths[part]:.1f}%"></i>' for part in PARTS)
    rows = "".join(
        f'<tr title="{PLACES[part]}"><th scope="row"><i class="key {part}"></i>{part}</th>'
        f"<td>{_figure(ms[part]) if total else NONE}</td></tr>"
        for part in PARTS
    )
    return (
        '<h3>ms per token, by part</h3><div class="bar" aria-hidden="true">'
        f'{bar}</div><table class="parts">{rows}</table>'
    )


def _crossed(shown: Figures) -> str:
    up, down = shown.bytes_each
    told = f"{up:,.0f} up, {down:,.0f} down" if shown.positions else NONE
    return _pair("bytes per token", told)


def _load(load: Load | None) -> str:
    if load is None:
        return _pair("trunk load", NONE)
    some = "1 session" if load.sessions == 1 else f"{load.sessions} sessions"
    told = (
        f"{some}, {load.kv_mib:,.1f} MiB of KV cache, {1000 * load.queued:.1f}\u00a0ms in the queue"
    )
    return _pair("trunk load", told)


def _pair(name: str, value: str) -> str:
    return f'<div><h3>{name}</h3><p class="value">{value}</p></div>'


def _seconds(value: float) -> str:
    return f"{value:.1f} s" if value >= 1 else f"{1000 * value:.0f} ms"


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
