"""Answers that say no, in OpenAI's form: {"error": {"message", "type", "param", "code"}} with an HTTP status.

Owns `Refusal` and what each of kvfs's errors becomes. Invariants: a client's mistake is a 4xx that names the parameter; what may work later is 429
or 503 with Retry-After; a fault of ours is a 500 that says nothing of our insides.
"""

from __future__ import annotations

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from kvfs.common.errors import DeadlineExceeded, InvalidArgument, KvfsError, Overloaded

RETRY_AFTER_S = 1
FAULT = "the server failed to answer this request; its log has the details under the request id"

_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
    504: "server_error",
}
_CODES = {
    401: "invalid_api_key",
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    413: "request_too_large",
    429: "rate_limit_exceeded",
    500: "internal_error",
    503: "service_unavailable",
    504: "timeout",
}


class Refusal(HTTPException):  # type: ignore[misc]
    """Raised anywhere before an answer has begun."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(status, message, headers={"Retry-After": str(RETRY_AFTER_S)} if status in (429, 503) else None)
        self.param = param
        self.code = code or _CODES.get(status)

    def describe(self) -> dict[str, object]:
        kind = _KINDS.get(self.status_code, "invalid_request_error")
        return {"error": {"message": self.detail, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.describe(), self.status_code, headers=self.headers)


def bad_parameter(param: str, message: str) -> Refusal:
    return Refusal(400, message, param=param, code="invalid_value")


def refusal_of(error: BaseException) -> Refusal:
    """What a client is told of it."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, HTTPException):  # Starlette's own: no such route, no such method
        return Refusal(error.status_code, str(error.detail))
    if isinstance(error, InvalidArgument):
        return Refusal(400, error.message)
    if isinstance(error, Overloaded):
        return Refusal(429, error.message)
    if isinstance(error, DeadlineExceeded):
        return Refusal(504, error.message)
    if isinstance(error, KvfsError) and error.retryable:
        return Refusal(503, error.message)
    return Refusal(500, FAULT)
