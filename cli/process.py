"""What every kvfs process has in common: logging, signals, readiness, and an end that leaves no traceback with the user.

`run_process(main)` runs a trio program until it ends or SIGTERM/SIGINT asks it to. Readiness goes to $KVFS_READY_FD (one JSON line; the supervisor
and `kvfs mount` wait for it) and to $NOTIFY_SOCKET (systemd). $KVFS_LIFELINE_FD is a pipe whose end means that the supervisor is gone: then stop.
Exit status: 0 asked to stop, 2 a person must change something (SetupError, IndexCorrupt), 3 the cluster told it to go (lease lost, newer
incarnation), 1 a fault.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from types import FrameType
from typing import TypeVar

import trio

from kvfs.common.errors import ClusterError, IndexCorrupt, KvfsError, SetupError

log = logging.getLogger("kvfs")

EXIT_FAULT = 1
EXIT_SETUP = 2
EXIT_CLUSTER = 3
MARK = "kvfs: error: "
"""Begins the one line for people among what goes to a log."""

T = TypeVar("T")
Ready = Callable[[dict[str, object]], None]


def configure_logging(level: str = "INFO") -> None:
    logging.basicConfig(
        level=os.environ.get("KVFS_LOG_LEVEL", level).upper(),
        stream=sys.stderr,
        format="%(asctime)s.%(msecs)03d %(levelname)s %(name)s: %(message)s",
        datefmt="%Y-%m-%dT%H:%M:%S",
    )


def announce_ready(info: dict[str, object]) -> None:
    """Tell whoever started us that the service answers now. Called once."""
    fd = os.environ.pop("KVFS_READY_FD", "")
    if fd:
        with os.fdopen(int(fd), "w") as pipe:
            pipe.write(json.dumps(info) + "\n")
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address:  # sd_notify(3): a leading @ is the abstract namespace
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            notify.sendto(b"READY=1\n", "\0" + address[1:] if address.startswith("@") else address)


@asynccontextmanager
async def told_to_stop(stop: trio.Event) -> AsyncIterator[None]:
    """What is inside is not cancelled when the process is told to stop: it hears of it by the event, and ends by itself, in bounded time."""

    async def listen() -> None:
        try:
            await trio.sleep_forever()
        finally:
            stop.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(listen)
        with trio.CancelScope(shield=True):
            yield
        nursery.cancel_scope.cancel()


async def _watch_signals(scope: trio.CancelScope) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for number in signals:
            log.info("%s: stopping", signal.Signals(number).name)
            scope.cancel()
            return


async def _watch_lifeline(scope: trio.CancelScope) -> None:
    fd = os.environ.pop("KVFS_LIFELINE_FD", "")
    if fd:
        async with trio.lowlevel.FdStream(int(fd)) as pipe:
            if await pipe.receive_some(1) == b"":
                log.info("the supervisor is gone: stopping")
                scope.cancel()


def first_error(error: BaseException) -> BaseException:
    """The first leaf of nested exception groups: what went wrong before the rest was cancelled."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def last_words(log_file: Path, since: int = 0) -> str:
    """The last line that a process wrote for people, after the first `since` bytes; empty when there is none."""
    try:
        with open(log_file, "rb") as file:
            file.seek(max(since, os.fstat(file.fileno()).st_size - 8192))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    marked = [line for line in lines if line.startswith(MARK)]
    return marked[-1].removeprefix(MARK) if marked else ""


@contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM and SIGHUP unwind like Ctrl-C, so that what was begun is cleaned up. Those that are ignored (nohup) stay so."""

    def raise_interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    numbers = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, raise_interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_command(main: Callable[[], Awaitable[T]]) -> T:
    """trio.run for a command that ends by itself. Ctrl-C cancels it between two steps of its tasks, not in the middle of one: what an interrupted
    step leaves behind (a request sent and not noted down) would be complained of. It comes out as KeyboardInterrupt, errors come out as they are."""
    interrupted = False
    failure: BaseException | None = None
    results: list[T] = []

    async def watch(scope: trio.CancelScope) -> None:
        nonlocal interrupted
        with trio.open_signal_receiver(signal.SIGINT) as signals:
            async for _ in signals:
                interrupted = True
                scope.cancel()

    async def supervised() -> None:
        nonlocal failure
        async with trio.open_nursery() as nursery:
            if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
                nursery.start_soon(watch, nursery.cancel_scope)
            try:
                results.append(await main())
            except Exception as error:
                failure = error
            nursery.cancel_scope.cancel()

    trio.run(supervised)
    if failure is not None:
        raise failure
    if interrupted:
        raise KeyboardInterrupt
    return results[0]


def run_process(main: Callable[[Ready], Awaitable[None]]) -> int:
    """Run `main(ready)` until it ends or is asked to stop; returns the exit status, with one line on stderr for a failure."""

    async def supervised() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_watch_signals, nursery.cancel_scope)
            nursery.start_soon(_watch_lifeline, nursery.cancel_scope)
            await main(announce_ready)
            nursery.cancel_scope.cancel()

    try:
        trio.run(supervised)
    except BaseException as caught:
        error = first_error(caught)
        if isinstance(error, SetupError | ClusterError | IndexCorrupt):
            print(MARK + error.message, file=sys.stderr, flush=True)
            return EXIT_CLUSTER if isinstance(error, ClusterError) else EXIT_SETUP
        if isinstance(error, KeyboardInterrupt):
            return 0
        if isinstance(error, KvfsError):
            print(MARK + error.message, file=sys.stderr, flush=True)
        log.error("ended by a fault", exc_info=caught)
        return EXIT_FAULT
    return 0
