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
from kvfs.common.boundary.system_net import SystemNet
from kvfs.common.wire import storage_pb2 as pb
from kvfs.common.wire.channel import ChannelPool
from kvfs.common.wire.identity import Identity
from kvfs.common.wire.server import RpcServer
from kvfs.common.wire.service import Method, method

VERSION = method("Storage", "Version")
LAST = method("Storage", "LastChunk")
SYNC = method("Storage", "Sync")
CALLERS = 64
LENGTH = struct.Struct("<I")
ROUNDS = 5
Call = Callable[[], Awaitable[Any]]
Cases = dict[str, Call]


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
    """Measures cases side by side: round after round each for a moment, and of each the round that cost least is shown, for what others do on the
    machine only ever adds."""

    def __init__(self, server: int, seconds: float, only: str) -> None:
        self.server, self.seconds, self.only = server, seconds / ROUNDS, only
        print(f"{'':44} {'client us':>9} {'server us':>9} {'sum':>7} {'p50 us':>7}   to bare", flush=True)

    def wanted(self, cases: Cases) -> Cases:
        return {name: case for name, case in cases.items() if name.startswith("bare") or self.only in name}

    def show(self, rounds: dict[str, list[tuple[float, float, float]]]) -> None:
        base = 0.0
        for name, found in rounds.items():
            mine, theirs, median = min(found, key=lambda costs: costs[0] + costs[1])
            base = base or mine + theirs
            print(f"{name:44} {mine:9.1f} {theirs:9.1f} {mine + theirs:7.1f} {median:7.0f}  {(mine + theirs) / base:6.2f}", flush=True)

    def costs(self, latencies: list[float], mine: float, theirs: float) -> tuple[float, float, float]:
        count = len(latencies)
        return mine / count * 1e6, theirs / count * 1e6, sorted(latencies)[count // 2] * 1e6

    async def measure(self, cases: Cases, callers: int) -> None:
        """The first case is what the others are compared with."""
        latencies: list[float] = []
        until = 0.0

        async def caller(call: Call) -> None:
            clock = time.perf_counter
            now = clock()
            while now < until:
                await call()
                before, now = now, clock()
                latencies.append(now - before)

        rounds: dict[str, list[tuple[float, float, float]]] = {name: [] for name in self.wanted(cases)}
        for _ in range(ROUNDS):
            for name in rounds:
                latencies.clear()
                mine, theirs = time.process_time(), cpu_s(self.server)
                until = time.perf_counter() + self.seconds
                async with trio.open_nursery() as nursery:
                    for _ in range(callers):
                        nursery.start_soon(caller, cases[name])
                rounds[name].append(self.costs(latencies, time.process_time() - mine, cpu_s(self.server) - theirs))
        self.show(rounds)

    def measure_portal(self, cases: Cases, portal: Portal) -> None:
        rounds: dict[str, list[tuple[float, float, float]]] = {name: [] for name in self.wanted(cases)}
        for _ in range(ROUNDS):
            for name in rounds:
                latencies: list[float] = []
                mine, theirs = time.process_time(), cpu_s(self.server)
                now = time.perf_counter()
                until = now + self.seconds
                while now < until:
                    portal.call(cases[name])
                    before, now = now, time.perf_counter()
                    latencies.append(now - before)
                rounds[name].append(self.costs(latencies, time.process_time() - mine, cpu_s(self.server) - theirs))
        self.show(rounds)


def connected(transport: str, folder: str, port: int) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX if transport == "unix" else socket.AF_INET)
    sock.connect(f"{folder}/echo.sock" if transport == "unix" else ("127.0.0.1", port))
    if transport == "tcp":
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def asking(pool: ChannelPool, address: str, asked: Method, request: Any) -> Call:
    where = (address,)
    return lambda: pool.call(where, asked, request, timeout_s=20)


async def compare(table: Table, folder: str, transport: str, address: str, port: int) -> None:
    for callers in (1, CALLERS):
        bare = Bare(connected(transport, folder, port))
        async with ChannelPool(SystemNet(), SystemClock(), Identity("bench", os.urandom(16))) as pool, trio.open_nursery() as nursery:
            if callers > 1:
                nursery.start_soon(bare.read)
            await table.measure(
                {
                    f"bare echo, {transport}, {callers} at once": bare.alone if callers == 1 else bare.together,
                    f"answered at once, {transport}, {callers} at once": asking(pool, address, VERSION, pb.VersionRequest(chain_id=7)),
                    f"async, never waits, {transport}, {callers} at once": asking(pool, address, LAST, pb.LastChunkRequest(inode=7)),
                    f"waits, {transport}, {callers} at once": asking(pool, address, SYNC, pb.SyncRequest()),
                },
                callers,
            )
            nursery.cancel_scope.cancel()


def compare_portal(table: Table, folder: str, transport: str, address: str, port: int) -> None:
    bare: list[Bare] = []

    @asynccontextmanager
    async def make() -> AsyncIterator[Any]:
        bare.append(Bare(connected(transport, folder, port)))
        async with ChannelPool(SystemNet(), SystemClock(), Identity("bench", os.urandom(16))) as pool:
            yield pool

    async def nothing() -> None:
        pass

    portal = Portal(make)
    with contextlib.closing(portal):
        table.measure_portal(
            {
                f"bare echo through the thread, {transport}": bare[0].alone,
                f"synchronous face, {transport}": asking(cast(Any, portal.client), address, VERSION, pb.VersionRequest(chain_id=7)),
                f"synchronous face, {transport}, nothing asked": nothing,
            },
            portal,
        )


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
            for transport, address in zip(("unix", "tcp"), addresses, strict=True):
                trio.run(compare, table, folder, transport, address, port)
                compare_portal(table, folder, transport, address, port)
        finally:
            server.terminate()
            server.join()


if __name__ == "__main__":
    main()
