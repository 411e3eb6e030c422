"""What a call costs: `python tests/bench/rpc.py [--seconds S] [--only SUBSTRING]`.

A server process and a client process on one machine. Prints CPU microseconds a call of each side and the median wall time, for the framed RPC over a
unix socket and TCP (a handler that answers at once, one that is `async` but never waits, one that waits), alone and with 64 callers, and through the
synchronous face's thread; beside a bare trio echo of length-prefixed protobuf of the same messages in the same run, which is what the ratios are to.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import socket
import struct
import tempfile
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, cast

import trio

from kvfs.client.portal import Portal
from kvfs.common.boundary.clock import SystemClock
from kvfs.common.boundary.net import SystemNet
from kvfs.common.wire import storage_pb2 as pb
from kvfs.common.wire.channel import ChannelPool
from kvfs.common.wire.identity import Identity
from kvfs.common.wire.server import RpcServer
from kvfs.common.wire.service import method

VERSION = method("Storage", "Version")
LAST = method("Storage", "LastChunk")
SYNC = method("Storage", "Sync")
CALLERS = 64
LENGTH = struct.Struct("<I")
Call = Callable[[], Awaitable[Any]]


class Handler:
    def version(self, request: Any, call: Any) -> Any:
        return pb.VersionReply(versions=[request.chain_id])

    async def last_chunk(self, request: Any, call: Any) -> Any:
        return pb.LastChunkReply(found=True, index=request.inode)

    async def sync(self, request: Any, call: Any) -> Any:
        await trio.lowlevel.checkpoint()
        return pb.SyncReply()


# --- the bare echo ---


class Messages:
    """Whole messages out of a stream."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream, self._buffer = stream, bytearray()

    async def more(self) -> list[bytes]:
        """At least one; empty at the end of the stream."""
        found: list[bytes] = []
        while not found:
            data = await self._stream.receive_some(65536)
            if not data:
                break
            self._buffer += data
            start = 0
            while len(self._buffer) - start >= 4:
                stop = start + 4 + LENGTH.unpack_from(self._buffer, start)[0]
                if stop > len(self._buffer):
                    break
                found.append(bytes(self._buffer[start + 4 : stop]))
                start = stop
            del self._buffer[:start]
        return found


async def echo(stream: trio.abc.Stream) -> None:
    messages = Messages(stream)
    while batch := await messages.more():
        replies = []
        for data in batch:
            request = pb.VersionRequest.FromString(data)
            reply = pb.VersionReply(versions=[request.chain_id]).SerializeToString()
            replies.append(LENGTH.pack(len(reply)) + reply)
        await stream.send_all(b"".join(replies))


class Bare:
    """The calling side of the echo: answers come in the order of the questions."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._stream = trio.SocketStream(trio.socket.from_stdlib_socket(sock))
        self._messages = Messages(self._stream)
        self._waiting: deque[trio.lowlevel.Task] = deque()

    async def alone(self) -> Any:
        data = pb.VersionRequest(chain_id=7).SerializeToString()
        await self._stream.send_all(LENGTH.pack(len(data)) + data)
        return pb.VersionReply.FromString((await self._messages.more())[0])

    async def read(self) -> None:
        while batch := await self._messages.more():
            for _ in batch:
                trio.lowlevel.reschedule(self._waiting.popleft())

    async def together(self) -> Any:
        data = pb.VersionRequest(chain_id=7).SerializeToString()
        self._waiting.append(trio.lowlevel.current_task())
        self._sock.send(LENGTH.pack(len(data)) + data)  # a few bytes for each caller: there is always room
        await trio.lowlevel.wait_task_rescheduled(lambda _: trio.lowlevel.Abort.FAILED)


# --- processes ---


def serve(folder: str, pipe: Any) -> None:
    async def main() -> None:
        server = RpcServer(SystemNet(), SystemClock(), Identity("bench", os.urandom(16), "storage"))
        server.add("Storage", Handler())
        listeners = [trio.SocketListener(await unix_listener(f"{folder}/echo.sock")), *await trio.open_tcp_listeners(0, host="127.0.0.1")]
        port = listeners[1].socket.getsockname()[1]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.serve_listeners, echo, listeners)
            addresses = await nursery.start(server.serve, [f"unix://{folder}/rpc.sock", "tcp://127.0.0.1:0"])
            pipe.send((addresses, port))

    trio.run(main)


async def unix_listener(path: str) -> trio.socket.SocketType:
    sock = trio.socket.socket(trio.socket.AF_UNIX)
    await sock.bind(path)
    sock.listen()
    return sock


def cpu_s(pid: int) -> float:
    """CPU time of a process, to the nanosecond: Linux makes a clock's id of a process's."""
    return time.clock_gettime(~pid << 3 | 2)


class Table:
    def __init__(self, server: int, seconds: float, only: str) -> None:
        self.server, self.seconds, self.only = server, seconds, only
        self.base: dict[str, float] = {}
        print(f"{'':44} {'client us':>9} {'server us':>9} {'sum':>7} {'p50 us':>7}   to bare", flush=True)

    def wanted(self, name: str) -> bool:
        return name.startswith("bare") or self.only in name

    def add(self, name: str, base: str, mine: float, theirs: float, latencies: list[float]) -> None:
        count = len(latencies)
        total = (mine + theirs) / count * 1e6
        median = sorted(latencies)[count // 2] * 1e6
        ratio = total / self.base.setdefault(base, total)
        print(f"{name:44} {mine / count * 1e6:9.1f} {theirs / count * 1e6:9.1f} {total:7.1f} {median:7.0f}  {ratio:6.2f}", flush=True)

    async def measure(self, name: str, base: str, call: Call, callers: int) -> None:
        if not self.wanted(name):
            return
        latencies: list[float] = []
        until = 0.0

        async def caller() -> None:
            clock = time.perf_counter
            now = clock()
            while now < until:
                await call()
                before, now = now, clock()
                latencies.append(now - before)

        for seconds in (self.seconds / 5, self.seconds):  # the first to warm up
            latencies.clear()
            mine, theirs = time.process_time(), cpu_s(self.server)
            until = time.perf_counter() + seconds
            async with trio.open_nursery() as nursery:
                for _ in range(callers):
                    nursery.start_soon(caller)
        self.add(name, base, time.process_time() - mine, cpu_s(self.server) - theirs, latencies)

    def measure_portal(self, name: str, base: str, pool: Callable[[], ChannelPool], where: tuple[str, ...]) -> None:
        if not self.wanted(name):
            return

        @asynccontextmanager
        async def make() -> AsyncIterator[Any]:
            async with pool() as channels:
                yield channels

        async def call() -> Any:
            return await cast(Any, portal.client).call(where, VERSION, pb.VersionRequest(chain_id=7), timeout_s=20)

        async def nothing() -> None:
            pass

        portal = Portal(make)
        with contextlib.closing(portal):
            for what, function in (("", call), (", a call that does nothing", nothing)):
                latencies: list[float] = []
                for seconds in (self.seconds / 5, self.seconds):
                    latencies.clear()
                    mine, theirs = time.process_time(), cpu_s(self.server)
                    now = time.perf_counter()
                    until = now + seconds
                    while now < until:
                        portal.call(function)
                        before, now = now, time.perf_counter()
                        latencies.append(now - before)
                self.add(name + what, base, time.process_time() - mine, cpu_s(self.server) - theirs, latencies)


async def compare(table: Table, folder: str, addresses: list[str], port: int) -> None:
    for transport, address in zip(("unix", "tcp"), addresses, strict=True):
        for callers in (1, CALLERS):
            sock = socket.socket(socket.AF_UNIX if transport == "unix" else socket.AF_INET)
            sock.connect(f"{folder}/echo.sock" if transport == "unix" else ("127.0.0.1", port))
            if transport == "tcp":
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            bare = Bare(sock)
            base = f"{transport} {callers}"
            async with trio.open_nursery() as nursery:
                if callers > 1:
                    nursery.start_soon(bare.read)
                await table.measure(f"bare echo, {transport}, {callers} at once", base, bare.alone if callers == 1 else bare.together, callers)
                nursery.cancel_scope.cancel()
            sock.close()
            async with ChannelPool(SystemNet(), SystemClock(), Identity("bench", os.urandom(16))) as pool:
                where = (address,)
                for what, asked, request in (
                    ("answered at once", VERSION, pb.VersionRequest(chain_id=7)),
                    ("async handler that never waits", LAST, pb.LastChunkRequest(inode=7)),
                    ("handler that waits", SYNC, pb.SyncRequest()),
                ):

                    async def call(where: tuple[str, ...] = where, asked: Any = asked, request: Any = request) -> Any:
                        return await pool.call(where, asked, request, timeout_s=20)

                    await table.measure(f"{what}, {transport}, {callers} at once", base, call, callers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        receive, send = context.Pipe(duplex=False)
        server = context.Process(target=serve, args=(folder, send), daemon=True)
        server.start()
        try:
            addresses, port = receive.recv()
            assert server.pid is not None
            table = Table(server.pid, options.seconds, options.only)
            trio.run(compare, table, folder, addresses, port)
            identity = Identity("bench", os.urandom(16))
            for transport, address in zip(("unix", "tcp"), addresses, strict=True):
                table.measure_portal(
                    f"synchronous face, {transport}", f"{transport} 1", lambda: ChannelPool(SystemNet(), SystemClock(), identity), (address,)
                )
        finally:
            server.terminate()
            server.join()


if __name__ == "__main__":
    main()
