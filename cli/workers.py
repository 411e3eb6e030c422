"""Worker processes of a command: each runs one function and answers requests over a pipe, so that clients are measured as separate processes.

Owns their life. Invariants: a worker never outlives its command by more than the request it is busy with (its pipe ends, and so does it); Ctrl-C is
the command's to handle and not the workers'; an error in a worker is raised in the command with its own words, and no traceback is printed.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import connection
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

from kvfs.common.errors import InputOutput, KvfsError, from_wire

STOP_S = 5.0


class Line:
    """A worker's end: requests come out, and each gets one answer."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe

    def __iter__(self) -> Iterator[Any]:
        while True:
            try:
                yield self._pipe.recv()
            except EOFError:
                return

    def answer(self, value: Any) -> None:
        self._pipe.send(("answer", value))

    def progress(self, count: int) -> None:
        self._pipe.send(("progress", count))


def _work(pipe: Connection, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        function(Line(pipe), *arguments)
    except (BrokenPipeError, ConnectionResetError):
        pass  # the command is gone
    except KvfsError as error:
        pipe.send(("failed", error.code, error.message))
    except Exception as error:
        cause = error.__cause__
        if isinstance(cause, KvfsError):  # as the client's synchronous face raises them
            pipe.send(("failed", cause.code, cause.message))
        else:
            pipe.send(("failed", InputOutput.code, f"a client process failed: {type(error).__name__}: {error}"))


class Workers:
    """`with Workers(function, [arguments of the first, ...]) as workers`; `function(line, *arguments)` must be importable by name."""

    def __init__(self, function: Callable[..., None], arguments: Sequence[tuple[Any, ...]]) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        for each in arguments:
            here, there = context.Pipe()
            process = context.Process(target=_work, args=(there, function, each), daemon=True)
            process.start()
            there.close()
            self._pipes.append(here)
            self._processes.append(process)

    def ask(self, request: Any, progress: Callable[[int], None] = lambda count: None) -> list[Any]:
        """Put the request to all of them at once; their answers in order. The error of the first that fails is raised."""
        return self.ask_each([request] * len(self._pipes), progress)

    def ask_each(self, requests: Sequence[Any], progress: Callable[[int], None] = lambda count: None) -> list[Any]:
        for pipe, request in zip(self._pipes, requests, strict=True):
            try:
                pipe.send(request)
            except (BrokenPipeError, ConnectionResetError):
                pass  # it has ended: what it said last is read below
        answers: dict[int, Any] = {}
        while len(answers) < len(self._pipes):
            waiting = [pipe for place, pipe in enumerate(self._pipes) if place not in answers]
            for ready in connection.wait(waiting):
                assert isinstance(ready, Connection)
                try:
                    kind, *content = ready.recv()
                except (EOFError, ConnectionResetError):
                    raise InputOutput("a client process ended before it answered") from None
                if kind == "failed":
                    raise from_wire(*content)
                if kind == "progress":
                    progress(content[0])
                else:
                    answers[self._pipes.index(ready)] = content[0]
        return [answers[place] for place in range(len(self._pipes))]

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(STOP_S if kind is None else 0)
            if process.is_alive():
                process.kill()
                process.join()
