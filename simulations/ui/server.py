"""Serves the page: headers that keep the browser from asking anyone else, a password, an end."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Awaitable, Callable

import fastapi
import gradio as gr
import uvicorn
from starlette.datastructures import MutableHeaders
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from simulations.ui.bind import same
from simulations.ui.look import CSS, theme

logger = logging.getLogger(__name__)

POLICY = "; ".join(
    (
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval'",  # Gradio's page needs both
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "font-src 'self' data:",
        "connect-src 'self'",
        "worker-src 'self' blob:",
        "object-src 'none'",
        "base-uri 'self'",
        "form-action 'self'",
        "frame-ancestors 'none'",
    )
)
"""An answer that names a picture elsewhere must not make the browser ask for it."""
HEADERS = {
    "Content-Security-Policy": POLICY,
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
SLOWLY = 1.0
"""Seconds that a wrong password costs."""


def make(
    page: gr.Blocks, *, loopback: bool, user: str = "graft", password: str | None = None
) -> fastapi.FastAPI:
    """Return the application around the page.

    Parameters
    ----------
    loopback : bool
        Whether only this machine may reach it: then it answers to no other name, so that no page of
        another site can have its name point here.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    app = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(_Headers)
    if loopback:
        names = ["localhost", "127.0.0.1", "[::1]", "::1"]
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=names)
    page.queue(default_concurrency_limit=16)
    return gr.mount_gradio_app(
        app,
        page,
        path="/",
        auth=_check(user, password) if password else None,
        auth_message=f"The user is <b>{user}</b>; whoever started the page chose the password.",
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
        theme=theme(),
        css_paths=[CSS],
    )


def serve(app: fastapi.FastAPI, listening: socket.socket) -> uvicorn.Server:
    """Return a server for the application; `run(sockets=[...])` blocks until it is told to end."""
    config = uvicorn.Config(
        app, log_level="warning", timeout_graceful_shutdown=2, server_header=False, lifespan="on"
    )
    return uvicorn.Server(config)


class _Headers:
    """Puts `HEADERS` on each answer, and lets a stream be a stream."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        await self._app(scope, receive, sent)


def _check(user: str, password: str) -> Callable[[str, str], Awaitable[bool]]:
    async def check(given_user: str, given: str) -> bool:
        good = same(given_user, user) & same(given, password)
        if not good:
            logger.warning("a wrong user name or password was given")
            await asyncio.sleep(SLOWLY)
        return good

    return check
