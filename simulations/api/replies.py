"""an answer on the wire: JSON at once, or server-sent events as it is made"""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from simulations.api.answers import Delta
from simulations.api.errors import ApiError
from simulations.api.forms import Form
from simulations.api.jobs import Job
from simulations.api.running import Gone, Runner, unless_gone
from simulations.api.trouble import as_api_error

EVENTS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
"""Nothing between the server and its client is to hold events back."""


async def reply(request: Request, runner: Runner, job: Job, form: Form) -> Response:
    """Answer a job in the form that was asked for."""
    deltas = runner.deltas(job)
    if not job.wanted.stream:
        return JSONResponse(form.whole(await unless_gone(request, _all(deltas))))
    first = await unless_gone(request, _next(deltas))  # a refusal has a status of its own
    said = _events(request, first, deltas, form)
    return _Events(_written(said, form, job), media_type="text/event-stream", headers=EVENTS)


class _Events(StreamingResponse):
    """A stream whose source looks itself whether its client is there, between tokens too."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.stream_response(send)


async def _all(deltas: AsyncGenerator[Delta]) -> list[Delta]:
    async with contextlib.aclosing(deltas):
        return [delta async for delta in deltas]


async def _written(said: AsyncIterator[dict[str, Any]], form: Form, job: Job) -> AsyncIterator[str]:
    """Write chunks as events, with what comes before and after them; an error is the last."""
    try:
        for chunk in form.begin():
            yield _event(chunk)
        async for chunk in said:
            yield _event(chunk)
    except Gone:
        return
    except (ApiError, ValueError, RuntimeError, OSError) as error:
        yield _event(as_api_error(error).body())
        return
    if job.wanted.include_usage:
        yield _event(form.last())
    yield "data: [DONE]\n\n"


async def _events(
    request: Request, first: Delta | None, deltas: AsyncGenerator[Delta], form: Form
) -> AsyncIterator[dict[str, Any]]:
    async with contextlib.aclosing(deltas):
        delta = first
        while delta is not None:
            yield form.chunk(delta)
            delta = await unless_gone(request, _next(deltas))


async def _next(deltas: AsyncGenerator[Delta]) -> Delta | None:
    return await anext(deltas, None)


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"
