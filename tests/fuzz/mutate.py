"""Makes wrong frames out of right ones, by a seed: wrong in their bytes, their header, their message, their order, their descriptors.

Owns the kinds of damage. A damaged message gets its checksums put right, so that it passes the frame's checks and reaches the parser and the service;
damage to the frame itself is left as it is, or put right as well, so that every check is met. Everything comes from one random.Random.
"""

from __future__ import annotations

import os
import random
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from google.protobuf.descriptor import FieldDescriptor

from kvfs.common.transport.region import Region
from kvfs.common.wire.frame import HEADER_BYTES, Kind, encode
from kvfs.common.wire.service import METHODS, Method

from .facts import Facts
from .recording import Frame

INTEGERS = (0, 1, 2, 3, 127, 255, 4095, 65535, 65537, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**59 + 1, 2**60 - 1, 2**63 - 1, 2**63, 2**64 - 1)
BYTES = (b"", b"\0", b".", b"..", b"a/b", b"\xff" * 16, b"\0" * 24, b"x" * 23, b"y" * 25, b"n" * 256, b"k" * 600, b"z" * 70_000)
TEXTS = ("", "\0", "é", "a" * 300, "../..", "tcp://127.0.0.1:1", "unix:///nowhere", "= [", "\U0001f600" * 40, "q" * 70_000)
RANGES = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
    FieldDescriptor.CPPTYPE_ENUM: (-(2**31), 2**31 - 1),
}
DEADLINES_MS = (1, 20, 100, 100, 300, 300, 300, 1000)
_FIELDS = struct.Struct("<4sBBHQIIIIII")
_FRONT = struct.Struct("<4sBBHQIIIII")


Corpus = dict[tuple[int, int], list[Frame]]
"""Recorded requests, by node and method."""


@dataclass(slots=True)
class Shot:
    """What is sent in one piece."""

    data: bytes
    fds: tuple[int, ...] = ()
    owned: list[Any] = field(default_factory=list)
    """Closed when it has been sent."""

    def close(self) -> None:
        for thing in self.owned:
            thing.close()


class Mutator:
    def __init__(self, chance: random.Random, facts: Facts, corpus: Corpus) -> None:
        self._chance = chance
        self._facts = facts
        self._corpus = corpus
        self._request_id = 0

    def session(self, node: int, methods: Sequence[Method], count: int, *, carries_fds: bool) -> list[Shot]:
        """`count` mutated frames for one connection, after its handshake. All but the last pass the frame's checks, most of the time."""
        chance = self._chance
        shots = [self._region()] if carries_fds and chance.random() < 0.5 else []
        while len(shots) < count:
            entry = chance.choice(methods)
            draw = chance.random()
            if draw < 0.03:
                shots.append(self._stray(carries_fds))
            elif draw < 0.06 and shots:
                shots.append(Shot(chance.choice(shots).data))  # a duplicate
            else:
                shots.append(Shot(self._request(entry, node)))
        if chance.random() < 0.1:
            chance.shuffle(shots)
        shots[-1] = Shot(self._damaged(shots[-1].data), shots[-1].fds, shots[-1].owned)
        return shots

    # --- messages --------------------------------------------------------------------------------------------------------------------

    def _request(self, method: Method, node: int) -> bytes:
        chance = self._chance
        known = self._corpus.get((node, method.key))
        payload = b""
        while True:
            if known and chance.random() < 0.6:
                frame = chance.choice(known)
                message, payload = method.request.FromString(frame.message), frame.payload
            else:
                message = self._facts.fill(method, node, chance)
                if method.has_bulk:
                    payload = self._bulk(message)
            for _ in range(chance.choice((0, 1, 1, 1, 2, 4))):
                self.spoil(message)
            data = message.SerializeToString()
            if data and chance.random() < 0.25:
                data = self.spoil_bytes(data)
            if not self._harms(method, data):
                break
        if chance.random() < 0.05:
            payload = chance.randbytes(chance.choice((1, 100, 5000)))
        self._request_id += 1
        key = method.key if chance.random() > 0.02 else chance.randrange(65536)
        if key != method.key and (other := METHODS.get(key)) is not None and self._harms(other, data):
            key = 0xFFFF
        deadline = chance.choice(DEADLINES_MS) if chance.random() > 0.02 else 0
        number = self._request_id if chance.random() > 0.02 else chance.choice((0, 1, 2**64 - 1))
        return encode(Kind.REQUEST, number, data, method=key, deadline_ms=deadline, payload_bytes=len(payload)) + payload

    def _bulk(self, message: Any) -> bytes:
        """Memory for a request: a payload, or spans of the connection's region."""
        chance = self._chance
        parts = message.writes if "writes" in message.DESCRIPTOR.fields_by_name else message.reads
        lengths = []
        for part in parts:
            part.length = chance.choice((0, 1, 100, 4096))
            if "kind" not in part.DESCRIPTOR.fields_by_name or part.kind in (0, 3, 4):
                lengths.append(part.length)
        message.bulk.length.extend(lengths)
        if chance.random() < 0.4:
            message.bulk.region.extend(chance.choice((1, 1, 1, 2, 99)) for _ in lengths)
            message.bulk.offset.extend(chance.choice((0, 0, 4096, 2**40, 2**64 - 1)) for _ in lengths)
            return b""
        return chance.randbytes(sum(lengths)) if "writes" in message.DESCRIPTOR.fields_by_name else b""

    def _harms(self, method: Method, data: bytes) -> bool:
        try:
            return self._facts.harms(method.request.FromString(data))
        except Exception:
            return False  # it does not parse

    def spoil(self, message: Any) -> None:
        """One field, somewhere in the message."""
        chance = self._chance
        while True:
            entry = chance.choice(message.DESCRIPTOR.fields) if message.DESCRIPTOR.fields else None
            if entry is None:
                return
            if entry.message_type is not None and entry.message_type.GetOptions().map_entry:
                numbers = entry.message_type.fields_by_name["value"].cpp_type == entry.CPPTYPE_DOUBLE
                value = chance.choice((0.0, -1.0, 1e308, float("inf"), float("nan"))) if numbers else chance.choice(TEXTS).replace("\0", "")
                getattr(message, entry.name)["f" * chance.choice((1, 1000))] = value
                return
            if entry.message_type is None:
                break
            parts = getattr(message, entry.name)
            if entry.is_repeated:
                if chance.random() < 0.1:
                    for _ in range(chance.choice((1, 5, 300))):
                        parts.add().CopyFrom(parts[0]) if parts else parts.add()
                    return
                if not parts or chance.random() < 0.1:
                    message.ClearField(entry.name)
                    return
                message = chance.choice(parts)
            elif chance.random() < 0.15:
                message.ClearField(entry.name)
                return
            else:
                parts.SetInParent()
                message = parts
        if entry.is_repeated:
            values = getattr(message, entry.name)
            values.extend(self._wrong(entry) for _ in range(chance.choice((1, 1, 2, 9000 if chance.random() < 0.05 else 3))))
            if chance.random() < 0.5:
                del values[: chance.randrange(len(values))]
        elif chance.random() < 0.15:
            message.ClearField(entry.name)
        else:
            setattr(message, entry.name, self._wrong(entry))

    def _wrong(self, entry: Any) -> Any:
        chance = self._chance
        if chance.random() < 0.3:
            return self._facts.value(entry, {}, chance)
        if entry.cpp_type in RANGES:
            least, most = RANGES[entry.cpp_type]
            return max(least, min(most, chance.choice(INTEGERS) * chance.choice((1, 1, 1, -1))))
        if entry.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
            return chance.random() < 0.5
        if entry.type == FieldDescriptor.TYPE_BYTES:
            return chance.choice(BYTES) if chance.random() < 0.7 else chance.randbytes(chance.choice((1, 8, 16, 24, 32)))
        return chance.choice(TEXTS)

    def spoil_bytes(self, data: bytes) -> bytes:
        chance = self._chance
        spoiled = bytearray(data)
        place = chance.randrange(len(spoiled))
        match chance.randrange(4):
            case 0:
                spoiled[place] ^= 1 << chance.randrange(8)
            case 1:
                del spoiled[place:]
            case 2:
                spoiled[place:place] = chance.randbytes(chance.randrange(1, 9))
            case _:
                spoiled[place : place + 5] = b"\xff\xff\xff\xff\x7f"
        return bytes(spoiled)

    # --- frames ----------------------------------------------------------------------------------------------------------------------

    def _damaged(self, data: bytes) -> bytes:
        chance = self._chance
        match chance.randrange(8):
            case 0 | 1:  # a bit, nothing put right
                spoiled = bytearray(data)
                spoiled[chance.randrange(len(spoiled))] ^= 1 << chance.randrange(8)
                return bytes(spoiled)
            case 2:
                return data[: chance.randrange(len(data))]
            case 3:
                return chance.randbytes(chance.choice((1, 39, 40, 200)))
            case 4:
                spoiled = bytearray(data)
                spoiled[4:4] = chance.randbytes(chance.randrange(1, 50))
                return bytes(spoiled)
            case 5:
                return data
            case _:
                return self._other_header(data)

    def _other_header(self, data: bytes) -> bytes:
        """One field of the header is another, and its checksum is right."""
        chance = self._chance
        fields = list(_FIELDS.unpack_from(data))[:-1]
        place = chance.choice((0, 1, 2, 2, 6, 7, 7, 8, 8, 9))
        most = {0: 0, 1: 255, 2: 255, 6: 2**32 - 1, 7: 2**32 - 1, 8: 2**32 - 1, 9: 2**32 - 1}[place]
        fields[place] = b"KVFT" if place == 0 else chance.choice((0, 1, 5, 9, fields[place] + 1, chance.randrange(most + 1), most)) & most
        if place == 2 and METHODS.get(fields[3]) is not None and fields[2] == Kind.REQUEST:
            return data
        return right_check(_FRONT.pack(*fields)) + data[HEADER_BYTES:]

    def _stray(self, carries_fds: bool) -> Shot:
        """A frame that does not belong there."""
        chance = self._chance
        if carries_fds and chance.random() < 0.6:
            return self._region()
        kind = chance.choice(list(Kind))
        number = chance.choice((0, 1, 2, 99, 2**64 - 1))
        message = chance.choice((b"", bytes(8), (4096).to_bytes(8, "little"), chance.randbytes(30)))
        payload = chance.choice((b"", b"", chance.randbytes(50)))
        kind = kind if kind != Kind.REQUEST else Kind.RELEASE
        return Shot(encode(kind, number, message, status=chance.choice((0, 0, 101, 99999)), payload_bytes=len(payload)) + payload)

    def _region(self) -> Shot:
        """Memory to register: good, unsealed, short, absurd, or no memory at all."""
        chance = self._chance
        size = 1 << 16
        claimed = chance.choice((size, size, size, size, 0, size + 1, 1 << 40, 2**64 - 1))
        frame = encode(Kind.REGION, chance.choice((1, 1, 1, 2, 3, 0)), claimed.to_bytes(8, "little"))
        match chance.randrange(12):
            case 0:
                return Shot(frame)
            case 1:
                return self._lent(frame, os.memfd_create("unsealed"))
            case 2:
                return self._lent(frame, os.open("/dev/null", os.O_RDWR))
            case 3:
                return self._lent(frame, os.open("/", os.O_RDONLY))
            case 4:
                pair = socket.socketpair()
                return Shot(frame, tuple(end.fileno() for end in pair), list(pair))
            case 5:
                region = Region.create(size)
                assert region.fd is not None
                return Shot(frame, (region.fd,) * chance.choice((2, 15, 40)), [region])
            case _:
                region = Region.create(size)
                assert region.fd is not None
                return Shot(frame, (region.fd,), [region])

    def _lent(self, frame: bytes, fd: int) -> Shot:
        return Shot(frame, (fd,), [os.fdopen(fd, "rb", closefd=True) if os.path.isfile(f"/proc/self/fd/{fd}") else _Descriptor(fd)])


class _Descriptor:
    def __init__(self, fd: int) -> None:
        self._fd = fd

    def close(self) -> None:
        os.close(self._fd)


def right_check(front: bytes) -> bytes:
    """A header whose own checksum is right, whatever it says."""
    from xxhash import xxh3_64_intdigest

    return front + (xxh3_64_intdigest(front) & 0xFFFFFFFF).to_bytes(4, "little")
