"""What a client sends in one request: its body, and that it is gone.

Owns `Incoming`. Invariants: everything that arrives is taken at once, whatever the application does, so that the server's own queue never fills up
and holds a connection for ever; never more of the body is kept than its bound; `gone` is set as soon as the client has left.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import trio

from kvfs.inference.http.refusals import Refusal

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]


class Incoming:
    def __init__(self, bytes_max: int, timeout_s: float) -> None:
        self._bytes_max = bytes_max
        self._timeout_s = timeout_s
        self._body = bytearray()
        self._length = 0
        self._complete = trio.Event()
        self.gone = trio.Event()

    async def pump(self, receive: Receive) -> None:
        """Takes what arrives, until the client is gone."""
        while not self.gone.is_set():
            message = await receive()
            if message["type"] == "http.disconnect":
                self.gone.set()
                self._complete.set()
                return
            chunk = message.get("body", b"")
            self._length += len(chunk)
            if self._length <= self._bytes_max:
                self._body += chunk
            else:
                self._body.clear()
            if not message.get("more_body"):
                self._complete.set()

    async def receive(self) -> MutableMapping[str, Any]:
        """For what takes it the ordinary way: the pump has taken everything but the end."""
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def body(self) -> bytes:
        """Whole. A `Refusal` where it is too large, or does not come."""
        with trio.move_on_after(self._timeout_s):
            await self._complete.wait()
            if self._length > self._bytes_max:
                raise Refusal(413, f"the request's body has {self._length} bytes: up to {self._bytes_max} are taken")
            if not self.gone.is_set():
                return bytes(self._body)
        raise Refusal(408, f"the request's body was not there after {self._timeout_s:g} s")

    async def while_here(self, work: Callable[[], Awaitable[None]]) -> None:
        """Runs it, and gives it up as soon as the client is gone."""
        failure: Exception | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._cancel_when_gone, nursery.cancel_scope)
            try:
                await work()
            except Exception as error:  # let through as it is, not in the nursery's group
                failure = error
            nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure

    async def _cancel_when_gone(self, scope: trio.CancelScope) -> None:
        await self.gone.wait()
        scope.cancel()
