"""What stands before every route: the request's id, API keys, the bound on requests under way, and errors in OpenAI's form.

Owns `Guard`, the outermost part of the application. Invariants: every answer carries x-request-id, the caller's where it is fit to be repeated;
without a key nothing but health and metrics answers; keys are compared in a time that does not depend on them; no exception and no traceback reaches
a client; what a client sends is taken until it is gone (incoming.py).
"""

from __future__ import annotations

import hmac
import logging
import re
from hashlib import sha256

import trio
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvfs.common.boundary.random import Random
from kvfs.inference.http.config import HttpConfig
from kvfs.inference.http.incoming import Incoming
from kvfs.inference.http.metrics import Metrics
from kvfs.inference.http.refusals import Refusal, refusal_of

log = logging.getLogger("kvfs.http")

OPEN_PATHS = {"/health", "/ping", "/metrics"}
"""For probes and scrapers, which carry no keys."""
INCOMING = "kvfs.incoming"
"""Where an endpoint finds what the client sends, in its scope."""
_FIT_ID = re.compile(r"[\x21-\x7e]{1,128}")


class Guard:
    def __init__(self, app: ASGIApp, config: HttpConfig, random: Random, metrics: Metrics) -> None:
        self._app, self._config, self._random, self._metrics = app, config, random, metrics
        self._keys = [sha256(key.encode()).digest() for key in config.api_keys]
        self._under_way = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        incoming = Incoming(self._config.body_bytes_max, self._config.body_timeout_s)
        self._under_way += 1
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(incoming.pump, receive)
                await self._answer({**scope, INCOMING: incoming}, send)
                nursery.cancel_scope.cancel()
        finally:
            self._under_way -= 1

    async def _answer(self, scope: Scope, send: Send) -> None:
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        identity = given if _FIT_ID.fullmatch(given) else self._random.bytes(16).hex()
        begun = False

        async def with_id(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                self._metrics.responded(message["status"])
                MutableHeaders(scope=message)["x-request-id"] = identity
            await send(message)

        try:
            self._admit(scope["path"], headers.get("authorization", ""))
            await self._app(scope, scope[INCOMING].receive, with_id)
        except Exception as error:
            refusal = refusal_of(error)
            if refusal.status_code == 500:
                log.error("request %s: %s %s failed", identity, scope["method"], scope["path"], exc_info=error)
            if not begun:
                await refusal.response()(scope, scope[INCOMING].receive, with_id)

    def _admit(self, path: str, authorization: str) -> None:
        if path not in OPEN_PATHS:
            if self._keys and not self._knows(authorization):
                raise Refusal(401, "Incorrect API key provided: send one of this server's as `Authorization: Bearer KEY`.")
            if self._under_way > self._config.requests_max:
                raise Refusal(429, f"{self._config.requests_max} requests are under way: try again later")

    def _knows(self, authorization: str) -> bool:
        kind, _, key = authorization.partition(" ")
        digest = sha256(key.strip().encode()).digest()
        matches = [hmac.compare_digest(digest, known) for known in self._keys]  # all of them, whichever fits
        return kind.lower() == "bearer" and any(matches)
