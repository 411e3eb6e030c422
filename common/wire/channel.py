"""One channel per peer, made when it is needed, over the best transport that both sides have.

A peer is named by its list of addresses, best last, as routing has it. A unix address is taken only on the machine and for the process that it names
(`?host=...&server=...`); when it does not lead there, TCP does. A channel on which a call ran out of time in complete silence is not used for further
calls: the peer may hang, or the network may swallow its packets. A pool belongs to one trio thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs

import trio

from kvfs.common.boundary.clock import Clock
from kvfs.common.boundary.net import Net
from kvfs.common.errors import DeadlineExceeded, TransportError, Unreachable
from kvfs.common.transport.region import BufferPool
from kvfs.common.wire.caller import DEFAULT_LIMITS, Channel
from kvfs.common.wire.calls import Arrivals
from kvfs.common.wire.frame import Limits
from kvfs.common.wire.identity import Identity
from kvfs.common.wire.lending import BorrowedFiles
from kvfs.common.wire.outgoing import Buffer
from kvfs.common.wire.service import Method

__all__ = ["Buffer", "Channel", "ChannelPool"]


class _Attempt:
    __slots__ = ("ended", "error")

    def __init__(self) -> None:
        self.ended = trio.Event()
        self.error: TransportError | None = None


class ChannelPool:
    """`async with` it around everything that calls."""

    def __init__(
        self,
        net: Net,
        clock: Clock,
        identity: Identity,
        *,
        limits: Limits = DEFAULT_LIMITS,
        connect_timeout_s: float = 3.0,
        staging_bytes: int = 16 << 20,
        shared_memory: bool = True,
    ) -> None:
        self.net = net
        self.clock = clock
        self.identity = identity
        self._limits = limits
        self._connect_timeout_s = connect_timeout_s
        self._staging_bytes = staging_bytes
        self._staging: BufferPool | None = None
        self._shared_memory = shared_memory
        self._channels: dict[tuple[str, ...], Channel] = {}
        self._opening: dict[tuple[str, ...], _Attempt] = {}
        self._nursery: trio.Nursery | None = None
        self._nursery_manager: Any = None

    async def __aenter__(self) -> Self:
        self._nursery_manager = trio.open_nursery()
        self._nursery = await self._nursery_manager.__aenter__()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        assert self._nursery is not None
        self._nursery.cancel_scope.cancel()
        self._nursery = None
        try:
            await self._nursery_manager.__aexit__(None, None, None)  # not told of the error: the nursery would wrap it in a group
        finally:
            self._channels.clear()
            if self._staging is not None:
                self._staging.close()

    async def call(
        self,
        addresses: Sequence[str],
        method: Method,
        request: Any,
        *,
        timeout_s: float,
        send: Sequence[Buffer] = (),
        receive: Sequence[Buffer] = (),
        arrivals: Arrivals | None = None,
        sent: Callable[[], None] | None = None,
    ) -> Any:
        """As Channel.call, connecting first where needed; connecting counts against the time. Unreachable: the request was not sent."""
        channel = self._channels.get(addresses if type(addresses) is tuple else tuple(addresses))
        if channel is None or channel.ended is not None:
            until = self.clock.monotonic() + timeout_s
            channel = await self.channel(addresses, timeout_s=timeout_s)
            timeout_s = max(0.001, until - self.clock.monotonic())
        try:
            return await channel.call(method, request, timeout_s=timeout_s, send=send, receive=receive, arrivals=arrivals, sent=sent)
        except DeadlineExceeded:
            if channel.suspect:
                self._drop(tuple(addresses), channel)
            raise

    async def channel(self, addresses: Sequence[str], *, timeout_s: float) -> Channel:
        """The peer's channel, opened if need be; callers that come meanwhile share the attempt, also its failure."""
        key = tuple(addresses)
        with trio.move_on_after(timeout_s):
            while True:
                channel = self._channels.get(key)
                if channel is not None and channel.ended is None:
                    return channel
                opening = self._opening.get(key)
                if opening is None:
                    break
                await opening.ended.wait()
                if opening.error is not None:
                    raise opening.error
            self._opening[key] = attempt = _Attempt()
            try:
                self._channels[key] = channel = await self._open(key, timeout_s)
                return channel
            except TransportError as error:
                attempt.error = error
                raise
            finally:
                del self._opening[key]
                attempt.ended.set()
        raise Unreachable(f"no connection with {' or '.join(key)} within {timeout_s:g} s")

    async def borrowed(self, addresses: Sequence[str], *, timeout_s: float) -> BorrowedFiles | None:
        """What the peer lends on the channel of now, opened if need be; None: nothing. Raises Unreachable."""
        channel = await self.channel(addresses, timeout_s=timeout_s)
        return channel.files if channel.peer.lends_files else None

    def forget(self, addresses: Sequence[str]) -> None:
        """The next call connects anew; calls under way go on."""
        channel = self._channels.get(tuple(addresses))
        if channel is not None:
            self._drop(tuple(addresses), channel)

    def _drop(self, key: tuple[str, ...], channel: Channel) -> None:
        if self._channels.get(key) is channel:
            del self._channels[key]
        channel.retire()

    async def _open(self, addresses: tuple[str, ...], timeout_s: float) -> Channel:
        """The best transport first: addresses are listed best last."""
        assert self._nursery is not None, "the pool is used outside its `async with`"
        until = self.clock.monotonic() + timeout_s
        error: TransportError | None = None
        for address in reversed(addresses):
            where, _, query = address.partition("?")
            facts = parse_qs(query)
            if where.startswith("unix://"):
                if not self._shared_memory or facts.get("host", [self.identity.host_id]) != [self.identity.host_id]:
                    continue
                if self._staging is None:
                    self._staging = BufferPool(self._staging_bytes, name="kvfs-staging")
            left = max(0.0, until - self.clock.monotonic())
            try:
                channel = await Channel.open(
                    self._nursery,
                    self.net,
                    self.clock,
                    self.identity,
                    where,
                    timeout_s=min(self._connect_timeout_s, left),
                    limits=self._limits,
                    staging=self._staging if where.startswith("unix://") else None,
                )
            except Unreachable as failed:
                error = failed if error is None else error
                continue
            if facts.get("server", [channel.peer.client_id.hex()]) != [channel.peer.client_id.hex()]:
                channel.close()  # the path is the same, the process behind it another one
                error = Unreachable(f"another process than the one that was sought answers at {where}")
                continue
            return channel
        raise error if error is not None else Unreachable(f"none of the addresses {', '.join(addresses)} can be reached from this machine")
