"""The frame: a fixed header, a message, raw payload bytes. docs/format.md has a worked example in bytes; this module is its only implementation.

    offset  size  field
    0       4     magic "KVFS"
    4       1     format version, 1
    5       1     kind (Kind)
    6       2     method: service number * 256 + method number
    8       8     request id, chosen by the caller
    16      4     deadline: milliseconds the caller will still wait (requests; 0 elsewhere)
    20      4     status: 0, or a code of common/errors.py (replies)
    24      4     message length
    28      4     payload length
    32      4     low half of the message's XXH3-64
    36      4     low half of the XXH3-64 of bytes 0 to 36 of the header

All numbers are little-endian. The header's own check comes before anything that it says is believed, so a damaged length is found at once and not
by waiting for bytes that never come. The payload is not covered: its bytes carry the checksums of what they are.
Must never allocate by a length that is above the limits.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, NamedTuple

from xxhash import xxh3_64_intdigest

from kvfs.common.errors import MalformedFrame, MessageTooBig, VersionMismatch

MAGIC: Final = b"KVFS"
FORMAT_VERSION: Final = 1
HEADER_BYTES: Final = 40
PROTOCOL_MIN: Final = 1
PROTOCOL_MAX: Final = 1
"""Versions of the messages and their meaning, settled in the handshake; the format version above is the frame's alone."""

_FRONT: Final = struct.Struct("<4sBBHQIIIII")
_WHOLE: Final = struct.Struct("<4sBBHQIIIIII")
_CHECK: Final = struct.Struct("<I")
_FRONT_BYTES: Final = _FRONT.size
_MASK: Final = 0xFFFFFFFF
_TABLE_COUNT: Final = struct.Struct("<I")
_TABLE_CHECK_BYTES: Final = 8


class Kind(IntEnum):
    HELLO = 1
    """First frame both ways; message Hello, or ErrorReply with a status."""
    REQUEST = 2
    REPLY = 3
    REPLY_HELD = 4
    """A reply; the caller's memory stays in use until RELEASE."""
    RELEASE = 5
    """The memory of an earlier REPLY_HELD is the caller's again."""
    REGION = 6
    """Registers memory under the request id; a file descriptor comes with the first byte. Message: its size, 8 bytes."""
    FORGET_REGION = 7
    """The region of this request id will not be named again."""
    GOODBYE = 8
    """Why the sender closes: status and ErrorReply."""
    FILE = 9
    """From the server: lends a file for reading, under the request id as its number; a file descriptor comes with the first byte."""


_KINDS: Final = frozenset(int(kind) for kind in Kind)


@dataclass(frozen=True, slots=True)
class Limits:
    message_bytes: int = 4 << 20
    payload_bytes: int = (64 << 20) + (64 << 10)
    in_flight: int = 256
    """Requests under way on one connection: beyond it the server stops reading, and a channel makes callers wait."""
    spans: int = 8192
    regions: int = 64
    files: int = 128
    """Files lent to one caller."""
    connections: int = 4096
    handshake_s: float = 5.0
    idle_s: float = 900.0
    """A connection on which nothing happens for so long is closed by the server; channels close a third of it earlier."""
    payload_pool_bytes: int = 256 << 20
    """Memory for payloads that arrive or leave over TCP, all connections together."""
    payload_wait_s: float = 2.0
    """How long a request waits for that memory before it is refused with Overloaded."""


class Header(NamedTuple):
    kind: int
    method: int
    request_id: int
    deadline_ms: int
    status: int
    message_bytes: int
    payload_bytes: int
    message_check: int


def encode(
    kind: int, request_id: int, message: bytes = b"", *, method: int = 0, deadline_ms: int = 0, status: int = 0, payload_bytes: int = 0
) -> bytes:
    """Header and message."""
    front = _FRONT.pack(
        MAGIC,
        FORMAT_VERSION,
        kind,
        method,
        request_id,
        deadline_ms,
        status,
        len(message),
        payload_bytes,
        xxh3_64_intdigest(message) & _MASK,
    )
    return front + _CHECK.pack(xxh3_64_intdigest(front) & _MASK) + message


def decode_header(buffer: bytes | bytearray | memoryview, offset: int, limits: Limits) -> Header:
    """The header at `offset`, checked. The buffer holds all of its 40 bytes."""
    magic, version, kind, method, request_id, deadline_ms, status, message_bytes, payload_bytes, message_check, check = _WHOLE.unpack_from(
        buffer, offset
    )
    if magic != MAGIC:
        raise MalformedFrame(f"not a kvfs frame: it begins with {magic!r}")
    if version != FORMAT_VERSION:
        raise VersionMismatch(f"the peer writes frames of format version {version}; this side knows version {FORMAT_VERSION}")
    if xxh3_64_intdigest(memoryview(buffer)[offset : offset + _FRONT_BYTES]) & _MASK != check:
        raise MalformedFrame("a frame header does not match its checksum: bytes were damaged on the way")
    if kind not in _KINDS:
        raise MalformedFrame(f"unknown frame kind {kind}")
    if message_bytes > limits.message_bytes:
        raise MessageTooBig(f"a message of {message_bytes} bytes is above the limit of {limits.message_bytes}")
    if payload_bytes > limits.payload_bytes:
        raise MessageTooBig(f"a payload of {payload_bytes} bytes is above the limit of {limits.payload_bytes}")
    return Header(kind, method, request_id, deadline_ms, status, message_bytes, payload_bytes, message_check)


def check_message(header: Header, message: bytes | bytearray | memoryview) -> None:
    if xxh3_64_intdigest(message) & _MASK != header.message_check:
        raise MalformedFrame("a message does not match its checksum: bytes were damaged on the way")


def table_bytes(count: int) -> int:
    """Size of the table of lengths that a reply's payload begins with."""
    return _TABLE_COUNT.size + 4 * count + _TABLE_CHECK_BYTES


def encode_table(lengths: list[int]) -> bytes:
    front = struct.pack(f"<I{len(lengths)}I", len(lengths), *lengths)
    return front + xxh3_64_intdigest(front).to_bytes(8, "little")


def decode_table(data: bytes | bytearray | memoryview, count: int) -> list[int]:
    """How many bytes were placed in each span. `count` is what the caller asked for: another count is damage."""
    front = memoryview(data)[:-_TABLE_CHECK_BYTES]
    if xxh3_64_intdigest(front).to_bytes(8, "little") != bytes(data[-_TABLE_CHECK_BYTES:]):
        raise MalformedFrame("a reply's table of lengths does not match its checksum")
    found, *lengths = struct.unpack(f"<I{count}I", front)
    if found != count:
        raise MalformedFrame(f"a reply's table of lengths has {found} entries for {count} spans")
    return lengths
