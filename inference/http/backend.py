"""What the HTTP server needs of those who compute: the router over workers, or any one thing that answers requests.

Owns the `Backend` protocol and `WorkerStatus`. It must never import an engine or a router: those fit it by their shape.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from kvfs.inference.request import Request, TokenEvent


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerStatus:
    """One worker, as the backend last heard of it."""

    name: str
    role: str
    """prefill, decode or both."""
    serving: bool
    """It answers, and takes new requests."""
    waiting: int = 0
    """Requests."""
    running: int = 0
    """Requests."""
    waiting_tokens: int = 0
    pages: int = 0
    pages_used: int = 0
    counters: Mapping[str, float] = field(default_factory=dict)
    """Since it started; names as in `metrics.WORKER_COUNTERS`."""


class Backend(Protocol):
    def generate(self, request: Request) -> AsyncGenerator[TokenEvent, None]:
        """The answer's tokens in order, the last event with a `finish`. `Overloaded` before the first where everyone is full, `Unreachable` where
        nobody is there. Closing the generator gives the request up. `cached_tokens` and `disk_tokens` of the first event are what the caller is told.
        """
        ...

    async def status(self) -> Sequence[WorkerStatus]:
        """Every worker; at most a second old."""
        ...


@runtime_checkable
class Flushable(Protocol):
    """A backend that can forget the prefixes it has in memory (what is on disk stays)."""

    async def flush(self) -> None: ...


@runtime_checkable
class Drainable(Protocol):
    """A backend whose workers can be taken out of service one by one."""

    async def drain(self, name: str, drain: bool = True) -> None:
        """No new requests for this worker, or new ones again; those it has it ends. InvalidArgument: there is none of that name."""
        ...
