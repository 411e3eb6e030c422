"""A Net whose connections change what services answer, before the client sees it: a damaged wire, or a server that lies.

Owns the cutting of a stream into frames and their damage. "damage" leaves checksums wrong, as a bad wire or bad memory does; "lies" puts them right,
as a faulty or malicious server would.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import trio

from kvfs.common.boundary.net import ByteStream, ReadBuffer
from kvfs.common.boundary.system_net import SystemNet
from kvfs.common.wire.frame import HEADER_BYTES, Kind, Limits, decode_header, encode
from kvfs.common.wire.service import METHODS, Method

from .mutate import Mutator
from .recording import frames_in

LIMITS = Limits()
Tamper = Callable[[bytes, "Method | None"], bytes]


class Tampered(ByteStream):
    """Over TCP: no descriptors travel."""

    carries_fds = False
    trusted = False

    def __init__(self, inner: ByteStream, tamper: Tamper) -> None:
        self._inner = inner
        self._tamper = tamper
        self.peer = inner.peer
        self._raw = bytearray()
        self._out = bytearray()
        self._ended = False
        self._asked: dict[int, Method] = {}
        self._sent = bytearray()
        self._buffer = memoryview(bytearray(1 << 16))

    def send_now(self, buffers: Sequence[ReadBuffer], fds: Sequence[int] = ()) -> int:
        taken = self._inner.send_now(buffers, fds)
        self._sent += b"".join(buffers)[:taken]
        used = 0
        for frame in frames_in(self._sent):
            used += HEADER_BYTES + len(frame.message) + len(frame.payload)
            if frame.header.kind == Kind.REQUEST:
                self._asked[frame.header.request_id] = METHODS[frame.header.method]
        del self._sent[:used]
        return taken

    def receive_now(self, views: Sequence[memoryview]) -> int | None:
        while not self._out and not self._ended:
            count = self._inner.receive_now([self._buffer])
            if count is None:
                return None
            if count == 0:
                self._ended = True
            self._raw += self._buffer[:count]
            self._cut()
        placed = 0
        for view in views:
            part = self._out[: view.nbytes]
            view[: len(part)] = part
            del self._out[: len(part)]
            placed += len(part)
        return placed

    def _cut(self) -> None:
        while len(self._raw) >= HEADER_BYTES:
            header = decode_header(self._raw, 0, LIMITS)
            size = HEADER_BYTES + header.message_bytes + header.payload_bytes
            if len(self._raw) < size:
                return
            self._out += self._tamper(bytes(self._raw[:size]), self._asked.pop(header.request_id, None))
            del self._raw[:size]

    async def wait_writable(self) -> None:
        await self._inner.wait_writable()

    async def wait_readable(self) -> None:
        if self._out or self._ended:
            await trio.lowlevel.checkpoint()
        else:
            await self._inner.wait_readable()

    def taken_fds(self) -> list[int]:
        return []

    def close_sending(self) -> None:
        self._inner.close_sending()

    def close(self) -> None:
        self._inner.close()


class TamperingNet(SystemNet):
    """Changes one frame in `every`, while `on`."""

    def __init__(self, chance: random.Random, mutator: Mutator, *, lies: bool, every: int) -> None:
        self._chance = chance
        self._mutator = mutator
        self._lies = lies
        self._every = every
        self.on = True
        self.tampered = 0

    async def connect(self, address: str, *, timeout_s: float) -> ByteStream:
        return Tampered(await super().connect(address, timeout_s=timeout_s), self.tampered_with)

    def tampered_with(self, frame: bytes, method: Method | None) -> bytes:
        if not self.on or self._chance.randrange(self._every):
            return frame
        self.tampered += 1
        return self._lie(frame, method) if self._lies else self._damage(frame)

    def _damage(self, frame: bytes) -> bytes:
        chance = self._chance
        spoiled = bytearray(frame)
        match chance.randrange(5):
            case 0:
                spoiled[chance.randrange(HEADER_BYTES)] ^= 1 << chance.randrange(8)
            case 1:
                place = chance.randrange(len(spoiled))
                spoiled[place : place + 8] = bytes(8)
            case 2:
                spoiled = spoiled[: chance.randrange(len(spoiled))] + chance.randbytes(HEADER_BYTES)
            case _:
                spoiled[chance.randrange(len(spoiled))] ^= 1 << chance.randrange(8)
        return bytes(spoiled)

    def _lie(self, frame: bytes, method: Method | None) -> bytes:
        chance = self._chance
        ((header, message, payload),) = ((part.header, part.message, part.payload) for part in frames_in(frame))
        fields: dict[str, Any] = {"status": header.status, "payload_bytes": len(payload)}
        number, kind = header.request_id, header.kind
        match chance.randrange(9):
            case 0:
                number = chance.choice((0, number + 1, number - 1, 2**64 - 1)) % 2**64
            case 1:
                kind = chance.choice(list(Kind))
            case 2:
                fields["status"] = chance.choice((1, 101, 108, 203, 204, 212, 300, 301, 302, 305, 401, 99_999, 2**32 - 1))
            case 3:
                payload = chance.choice((b"", payload[:-1], payload + b"x", chance.randbytes(200)))
                fields["payload_bytes"] = len(payload)
            case 4:
                return frame + frame
            case 5:
                message = self._mutator.spoil_bytes(message) if message else b"\xff"
            case _:
                if method is not None and not header.status:
                    reply = method.reply.FromString(message)
                    for _ in range(chance.choice((1, 1, 2, 4))):
                        self._mutator.spoil(reply)
                    message = reply.SerializeToString()
        return encode(kind, number, message, **fields) + payload
