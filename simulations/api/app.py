"""the endpoints: OpenAI's, and what else its clients ask a server"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from simulations.api.chat import read_chat
from simulations.api.completion import read_completion
from simulations.api.errors import ApiError, too_large, unauthorised, unknown_model
from simulations.api.forms import ChatForm, CompletionForm
from simulations.api.jobs import check_count, job_of_chat, job_of_completion
from simulations.api.keys import LOOPBACK_NAMES, has_key
from simulations.api.replies import reply
from simulations.api.running import Gone, Runner
from simulations.api.trouble import as_api_error
from simulations.talk.speaker import Speaker

MOST_BYTES = 8 * 2**20


@dataclass(frozen=True, kw_only=True)
class Access:
    """Who may ask."""

    key: str = ""
    """Empty: whoever can reach the server under a name of this machine."""
    origins: Sequence[str] = ()
    """Of web pages that may read answers (CORS)."""


def make_app(speaker: Speaker, runner: Runner, access: Access) -> FastAPI:
    """Return the app of one model."""

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        yield
        runner.close()

    app = FastAPI(lifespan=life, docs_url=None, redoc_url=None, openapi_url=None)
    _say_errors(app)
    if access.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(access.origins),
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
        )
    _Endpoints(speaker, runner, access).attach(app)
    return app


class _Endpoints:
    def __init__(self, speaker: Speaker, runner: Runner, access: Access) -> None:
        self._speaker, self._runner, self._access = speaker, runner, access
        self._created, self._fingerprint = int(time.time()), fingerprint(speaker)

    def attach(self, app: FastAPI) -> None:
        """Put every endpoint in its place; all but /health want the key."""
        app.get("/health")(self.health)
        for path, get in {
            "/v1/models": self.models,
            "/v1/models/{name:path}": self.model,
            "/tokenizer_info": self.tokenizer_info,
        }.items():
            app.get(path)(self._guarded(get))
        for path, post in {
            "/v1/chat/completions": self.chat,
            "/v1/completions": self.complete,
            "/tokenize": self.tokenize,
            "/detokenize": self.detokenize,
        }.items():
            app.post(path)(self._guarded(post))

    def _guarded(self, endpoint: Callable[[Request], Any]) -> Callable[[Request], Any]:
        async def guarded(request: Request) -> Response:
            self._check(request)
            found = await endpoint(request)
            return found if isinstance(found, Response) else JSONResponse(found)

        return guarded

    def _check(self, request: Request) -> None:
        header = request.headers.get("authorization", "")
        if self._access.key:
            if not has_key(header, self._access.key):
                raise unauthorised(bool(header))
        elif (request.url.hostname or "") not in LOOPBACK_NAMES:
            # A web page whose name was made to point to this machine would read along.
            raise ApiError(
                f"without an API key only names of this machine are answered, not "
                f"{request.url.hostname}; start graft api with a key",
                status=403,
                code="host_not_allowed",
            )

    async def health(self, request: Request) -> JSONResponse:
        """Say that the server is there, and how many requests it has."""
        gate = self._runner.gate
        return JSONResponse({"status": "ok", "running": gate.running, "waiting": gate.waiting})

    async def models(self, request: Request) -> dict[str, Any]:
        """Name the model."""
        return {"object": "list", "data": [self._model()]}

    async def model(self, request: Request) -> dict[str, Any]:
        """Describe the model."""
        name = request.path_params["name"]
        if name != self._speaker.name:
            raise unknown_model(name, (self._speaker.name,))
        return self._model()

    async def chat(self, request: Request) -> Response:
        """Answer a conversation."""
        job = job_of_chat(self._speaker, read_chat(await body_of(request)))
        form = ChatForm(self._speaker.tokenizer, job, self._fingerprint)
        return await reply(request, self._runner, job, form)

    async def complete(self, request: Request) -> Response:
        """Go on with texts, or judge them."""
        job = job_of_completion(self._speaker, read_completion(await body_of(request)))
        form = CompletionForm(self._speaker.tokenizer, job, self._fingerprint)
        return await reply(request, self._runner, job, form)

    async def tokenizer_info(self, request: Request) -> dict[str, Any]:
        """Describe the tokenizer, as vLLM does: lm-evaluation-harness asks for it."""
        tokenizer = self._speaker.tokenizer
        return {
            "tokenizer_class": type(tokenizer).__name__,
            "eos_token": tokenizer.eos_token,
            "bos_token": tokenizer.bos_token,
            "pad_token": tokenizer.pad_token,
            "chat_template": tokenizer.chat_template,
        }

    async def tokenize(self, request: Request) -> dict[str, Any]:
        """Return a text's tokens, as vLLM does."""
        body = await body_of(request)
        text, special = body.get("prompt"), body.get("add_special_tokens", True)
        if not isinstance(text, str):
            raise ApiError("prompt: is to be a string", param="prompt", code="invalid_type")
        tokens = self._tokens(text, bool(special))
        return {
            "tokens": tokens,
            "count": len(tokens),
            "max_model_len": self._speaker.context,
        }

    def _tokens(self, text: str, special: bool) -> list[int]:
        tokenizer = self._speaker.tokenizer
        if text in tokenizer.all_special_tokens:  # so lm-eval learns the id of the end of a text
            return [int(tokenizer.convert_tokens_to_ids(text))]
        if special:
            return self._speaker.prompts.text(text)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    async def detokenize(self, request: Request) -> dict[str, Any]:
        """Return tokens' text, as vLLM does."""
        tokens = check_count((await body_of(request)).get("tokens"))
        return {"prompt": self._speaker.tokenizer.decode(tokens)}

    def _model(self) -> dict[str, Any]:
        return {
            "id": self._speaker.name,
            "object": "model",
            "created": self._created,
            "owned_by": "graft",
            "max_model_len": self._speaker.context,
        }


def fingerprint(speaker: Speaker) -> str:
    """Return a word that changes with the model's name and configuration."""
    told = json.dumps([speaker.name, speaker.model.config.to_dict()], default=str, sort_keys=True)
    return f"fp_{hashlib.sha256(told.encode()).hexdigest()[:12]}"


async def body_of(request: Request) -> dict[str, Any]:
    """Read a request's JSON, and not more of it than may be.

    JSON must be said to be JSON: a browser asks before it sends that for a page of another site.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise ApiError("send the header 'Content-Type: application/json'", status=415)
    raw = bytearray()
    async for some in request.stream():
        raw += some
        if len(raw) > MOST_BYTES:
            raise too_large(len(raw), MOST_BYTES)
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ApiError(f"the body is no JSON: {error}") from error
    if not isinstance(body, dict):
        raise ApiError("the body is to be a JSON object")
    return body


def _say_errors(app: FastAPI) -> None:
    async def api_error(request: Request, error: Exception) -> Response:
        told = as_api_error(error)
        return JSONResponse(told.body(), status_code=told.status, headers=told.headers)

    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        words = f"{error.detail}: {request.method} {request.url.path}"
        return JSONResponse(ApiError(words).body(), status_code=error.status_code)

    async def gone(request: Request, error: Exception) -> Response:
        return Response(status_code=499)  # for the log: nobody reads it

    for kind in (ApiError, ValueError, RuntimeError, OSError, Exception):
        app.add_exception_handler(kind, api_error)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(Gone, gone)
