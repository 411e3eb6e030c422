"""One connection of an attacker: what is sent, and what the service must do about it whatever it is.

Owns the rules. Every request that was whole and came before the first malformed frame is answered once, by a status of common/errors.py that is not
InternalError; after the attacker's end of the stream the service closes the connection; both in bounded time; and all that it says is well formed.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import trio

from kvfs.common.boundary.net import ByteStream, Net
from kvfs.common.errors import BY_CODE, ConnectionLost, InternalError, KvfsError
from kvfs.common.wire.frame import HEADER_BYTES, Kind, Limits, check_message, decode_header
from kvfs.common.wire.service import METHODS

from .mutate import Shot
from .recording import frames_in

PATIENCE_S = 30.0
LATE_S = 4.0
"""A service gives a Hello 5 s."""
LIMITS = Limits()
SENDS = 64


@dataclass(slots=True)
class Findings:
    frames: int = 0
    connections: int = 0
    answers: Counter[str] = field(default_factory=Counter)
    """By the error's name; "ok" for success."""
    methods: Counter[tuple[str, str]] = field(default_factory=Counter)
    """The same by method."""
    late: int = 0
    """Connections that this process, standing still, greeted too late on."""
    faults: list[str] = field(default_factory=list)


def due(data: bytes) -> tuple[Counter[int], dict[int, int], bool]:
    """Ids of the requests that must be answered: those before the first frame that ends the connection; the method of each; and whether there
    is such a frame."""
    ids: Counter[int] = Counter()
    methods: dict[int, int] = {}
    place = 0
    while len(data) - place >= HEADER_BYTES:
        try:
            header = decode_header(data, place, LIMITS)
            stop = place + HEADER_BYTES + header.message_bytes
            if stop + header.payload_bytes > len(data):
                return ids, methods, True
            check_message(header, data[place + HEADER_BYTES : stop])
        except KvfsError:
            return ids, methods, True
        if header.kind == Kind.REQUEST:
            ids[header.request_id] += 1
            methods[header.request_id] = header.method
        elif header.kind != Kind.FORGET_REGION or header.payload_bytes:
            return ids, methods, True  # it may end the connection, or not
        place = stop + header.payload_bytes
    return ids, methods, place < len(data)


async def attack(net: Net, address: str, hello: bytes, shots: Sequence[Shot], findings: Findings, name: str) -> None:
    began_s = time.monotonic()
    stream = await net.connect(address, timeout_s=PATIENCE_S)
    got = bytearray()
    closed = ""
    greeted_s: list[float] = []
    try:
        with trio.move_on_after(PATIENCE_S):
            async with trio.open_nursery() as nursery:
                cut_off: list[bool] = []
                nursery.start_soon(_send, stream, hello, shots, cut_off, greeted_s)
                closed = await _receive(stream, got)
                closed = "reset" if cut_off else closed  # the kernel tells of it only once, whoever comes first
                nursery.cancel_scope.cancel()
    finally:
        stream.close()
        for shot in shots:
            shot.close()
    findings.connections += 1
    findings.frames += len(shots)
    if not got and closed and (not greeted_s or greeted_s[0] - began_s > LATE_S):
        findings.late += 1  # this process stood still, and the service took us for a silent client: it was right
        return
    asked = b"".join(shot.data for shot in shots)
    for fault in _judge(bytes(got), closed, asked, findings):
        findings.faults.append(f"{name}, {address}: {fault}; sent after the handshake: {asked[:4000].hex()}")


async def _send(stream: ByteStream, hello: bytes, shots: Sequence[Shot], cut_off: list[bool], greeted_s: list[float]) -> None:
    try:
        await stream.send([hello])
        greeted_s.append(time.monotonic())
        for shot in shots:
            await stream.send([shot.data], shot.fds)
        stream.close_sending()
    except (ConnectionLost, OSError):
        cut_off.append(True)  # the service closed first, or the kernel takes no such descriptors


async def _receive(stream: ByteStream, got: bytearray) -> str:
    """How it ended. A service that closes while bytes of ours are unread makes the kernel throw away what we have not read: "reset"."""
    buffer = memoryview(bytearray(1 << 16))
    try:
        while count := await stream.receive_into(buffer):
            got += buffer[:count]
        return "end"
    except ConnectionLost:
        return "reset"


def _judge(got: bytes, closed: str, sent: bytes, findings: Findings) -> list[str]:
    asked, methods, malformed = due(sent)
    faults = [] if closed else [f"the connection was not closed within {PATIENCE_S:g} s"]
    try:
        frames = list(frames_in(got))
        for frame in frames:
            check_message(frame.header, frame.message)
    except KvfsError as error:
        return [*faults, f"the service sent a malformed frame: {error.message}"]
    answered: Counter[int] = Counter()
    for frame in frames:
        header = frame.header
        if header.kind in (Kind.REPLY, Kind.REPLY_HELD):
            answered[header.request_id] += 1
        if header.kind in (Kind.REPLY, Kind.REPLY_HELD, Kind.GOODBYE):
            error = BY_CODE.get(header.status)
            name = "ok" if header.status == 0 else error.__name__ if error else f"status {header.status}"
            findings.answers[name] += 1
            if (known := METHODS.get(methods.get(header.request_id, 0))) is not None and header.kind != Kind.GOODBYE:
                findings.methods[known.full_name, name] += 1
            if header.status == InternalError.code:
                faults.append(f"request {header.request_id} got InternalError: {frame.message[2:].decode(errors='replace')}")
            elif header.status and error is None:
                faults.append(f"request {header.request_id} got the unknown status {header.status}")
        elif header.kind not in (Kind.HELLO, Kind.RELEASE, Kind.FILE):
            faults.append(f"the service sent a frame of kind {header.kind}")
    if closed == "reset" and not malformed:
        faults.append("the service reset the connection, though all that came was whole")
    if closed == "end" and (missing := asked - answered):
        faults.append(f"requests {sorted(missing)} were not answered")
    return faults
