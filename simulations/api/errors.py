"""errors as OpenAI's clients know them: a status, and a body of message, type, param and code"""

from __future__ import annotations

from typing import Any

INVALID, SERVER, BUSY = "invalid_request_error", "server_error", "rate_limit_error"


class ApiError(Exception):
    """What a client is told instead of an answer.

    Parameters
    ----------
    message
        The values and the remedy, in words.
    status
        Of HTTP.
    kind
        OpenAI's `type`.
    param
        The parameter that is wrong, if it is one.
    code
        A word for programs.
    headers
        Of the answer, beside the usual ones.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        kind: str = INVALID,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.status, self.headers = message, status, headers or {}
        self.kind, self.param, self.code = kind, param, code

    def body(self) -> dict[str, Any]:
        """Return the body of the answer."""
        told = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": told}


def wrong(param: str, message: str, code: str = "invalid_value") -> ApiError:
    """Return a refusal of one parameter's value."""
    return ApiError(f"{param}: {message}", param=param, code=code)


def unsupported(param: str, message: str) -> ApiError:
    """Return a refusal of a parameter that would change what is meant."""
    return ApiError(f"{param}: {message}", param=param, code="unsupported_parameter")


def unknown_model(name: str, names: tuple[str, ...]) -> ApiError:
    """Return a refusal of a model that is not served here."""
    have = ", ".join(names)
    return ApiError(
        f"there is no model {name!r} here; there is {have}",
        status=404,
        param="model",
        code="model_not_found",
    )


def unauthorised(given: bool) -> ApiError:
    """Return a refusal of who has no key, or a wrong one."""
    how = "send the header 'Authorization: Bearer KEY'"
    said = "this API key is not the server's" if given else f"an API key is needed: {how}"
    return ApiError(
        said, status=401, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"}
    )


def too_long(prompt: int, new: int, context: int, param: str) -> ApiError:
    """Return a refusal of a prompt that leaves no room for the answer."""
    return ApiError(
        f"the model's context is {context} tokens; you asked for {prompt + new}: {prompt} of the "
        f"prompt and {new} to be generated. Shorten the prompt or lower max_tokens",
        param=param,
        code="context_length_exceeded",
    )


def too_large(size: int, limit: int) -> ApiError:
    """Return a refusal of a body that is not read."""
    return ApiError(
        f"the request has {size:,} bytes or more; at most {limit:,} are read",
        status=413,
        code="request_too_large",
    )


def busy(running: int, waiting: int) -> ApiError:
    """Return a refusal because too many wait already."""
    return ApiError(
        f"{running} requests are being answered and {waiting} wait, which is as many as may; "
        "try again, or start graft api with a larger --parallel or --queue",
        status=429,
        kind=BUSY,
        code="rate_limit_exceeded",
        headers={"Retry-After": "1"},
    )


def away(reason: str) -> ApiError:
    """Return what is said when the trunk cannot be used."""
    return ApiError(
        f"the trunk does not answer: {reason}",
        status=503,
        kind=SERVER,
        code="trunk_unavailable",
        headers={"Retry-After": "2"},
    )


def internal() -> ApiError:
    """Return what is said of an error of ours, which the log holds in full."""
    return ApiError(
        "the server failed; its log says how", status=500, kind=SERVER, code="internal_error"
    )
