"""What happened in a run, one line an event: virtual time, who, what. Two runs of one seed have the same lines, in any process.

Owns the lines, their digest, and the two ways by which the product's own words get in: its log records (whose task logged is known by a context
variable that every task of a machine inherits), and, for reading, the frames that machines send each other. Lines hold nothing that differs between
processes: no addresses of objects, no process ids.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Final

import trio

from kvfs.common.sim.net import SimStream
from kvfs.common.wire.frame import HEADER_BYTES, Header, Kind, Limits, decode_header
from kvfs.common.wire.service import METHODS, Method


@dataclass(slots=True)
class Speaker:
    """One life of a process."""

    name: str
    dead: bool = False
    """What it says while it unwinds, nobody hears."""


WHO: ContextVar[Speaker] = ContextVar("WHO", default=Speaker("sim"))  # noqa: B039
"""To whom the running task belongs."""

_LIMITS: Final = Limits()
_PID: Final = re.compile(r"pid \d+")


class Trace(logging.Handler):
    def __init__(self, show: Callable[[str], None] | None = None) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []
        self._show = show
        self._hash = hashlib.blake2b(digest_size=16)

    def event(self, who: str, what: str) -> None:
        line = f"{trio.current_time():10.4f}  {who:<4}  {what}"
        self.lines.append(line)
        self._hash.update(line.encode() + b"\n")
        if self._show is not None:
            self._show(line)

    def emit(self, record: logging.LogRecord) -> None:
        who = WHO.get()
        if who.dead:
            return
        text = _PID.sub("pid", record.getMessage())
        if record.exc_info and record.exc_info[1] is not None:
            text += f" [{record.exc_info[1]!r}]"
        self.event(who.name, f"{record.levelname.lower()}: {text}" if record.levelno > logging.INFO else text)

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()


class Frames:
    """Reads what streams send, for people: it is not part of the trace."""

    def __init__(self, show: Callable[[str], None]) -> None:
        self._show = show
        self._rest: dict[int, tuple[SimStream, bytearray, int]] = {}
        self._asked: dict[tuple[int, int], Method] = {}

    def on_send(self, stream: SimStream, data: bytes) -> None:
        _, rest, skip = self._rest.get(id(stream), (stream, bytearray(), 0))
        rest += data
        while True:
            if skip:
                cut = min(skip, len(rest))
                del rest[:cut]
                skip -= cut
            if skip or len(rest) < HEADER_BYTES:
                break
            header = decode_header(rest, 0, _LIMITS)
            if len(rest) < HEADER_BYTES + header.message_bytes:
                break
            self._one(stream, header, bytes(rest[HEADER_BYTES : HEADER_BYTES + header.message_bytes]))
            del rest[: HEADER_BYTES + header.message_bytes]
            skip = header.payload_bytes
        self._rest[id(stream)] = (stream, rest, skip)

    def _one(self, stream: SimStream, header: Header, message: bytes) -> None:
        name, text = Kind(header.kind).name.lower(), ""
        if header.kind == Kind.REQUEST:
            method = self._asked[id(stream), header.request_id] = METHODS[header.method]
            name, text = method.full_name, _short(method.request.FromString(message))
        elif header.kind in (Kind.REPLY, Kind.REPLY_HELD):
            asked = self._asked.pop((id(stream.far), header.request_id), None)
            if asked is not None:
                text = f"error {header.status}" if header.status else _short(asked.reply.FromString(message))
                name = f"reply to {asked.full_name}"
        self._show(f"{trio.current_time():10.4f}  {stream.host:<4}  -> {stream.far.host} #{header.request_id} {name} {text}")


def _short(message: object) -> str:
    return " ".join(str(message).split())[:400]
