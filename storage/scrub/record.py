"""What is known of the scrubs of one target: how far the pass is, what it found, what is damaged now. Pure, and its form on the disk.

Owns when a pass is due. Invariants: a pass goes through the chunks in the order of their ids and never back, so that after a restart it goes on where
it was; `damaged` names chunks that no replica had whole when they were last looked at, at most DAMAGED_MAX of them; times are wall times and decide
nothing but when the next pass begins: a clock that was set back only makes it begin earlier. A record that cannot be read is none: the target counts
as scrubbed when it is opened (`state.py`).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

from kvfs.common.checksum import xxh3_64
from kvfs.common.ids import CHUNK_ID_BYTES

NAME = "scrub"
DAMAGED_MAX = 4096
_MAGIC = b"kvfs-scb"
_HEAD = struct.Struct(f"<8sI?3xQqqQQQQ{CHUNK_ID_BYTES}sI")
# magic, format, running, passes, started, finished, chunks, bytes, found, repaired, position (zeros: at the beginning), damaged chunks; then those
_DAMAGED = struct.Struct(f"<{CHUNK_ID_BYTES}sQ")  # chunk id, version
_CHECK = struct.Struct("<Q")
_FORMAT = 1
_BEGINNING = bytes(CHUNK_ID_BYTES)


@dataclass(slots=True)
class ScrubRecord:
    passes: int = 0
    """That ended."""
    running: bool = False
    started_ns: int = 0
    """Of the pass that runs or ran last; of a target that was never scrubbed, since when it is there."""
    finished_ns: int = 0
    chunks: int = 0
    bytes_read: int = 0
    found: int = 0
    repaired: int = 0
    position: bytes = b""
    """The last chunk that was looked at."""
    damaged: dict[bytes, int] = field(default_factory=dict)
    """chunk id -> version"""

    def begin(self, now_ns: int) -> None:
        self.running, self.started_ns = True, now_ns
        self.chunks = self.bytes_read = self.found = self.repaired = 0
        self.position = b""

    def looked_at(self, chunk_id: bytes, stored: int) -> None:
        self.position = chunk_id
        self.chunks += 1
        self.bytes_read += stored

    def mended(self, chunk_id: bytes) -> None:
        self.damaged.pop(chunk_id, None)

    def lost(self, chunk_id: bytes, version: int) -> None:
        if len(self.damaged) < DAMAGED_MAX or chunk_id in self.damaged:
            self.damaged[chunk_id] = version

    def end(self, now_ns: int) -> None:
        self.running, self.finished_ns = False, now_ns
        self.passes += 1

    def due(self, now_ns: int, interval_s: float) -> bool:
        """Whether a pass should run now: one that was interrupted, or the next (interval 0: none by itself)."""
        return self.running or (interval_s > 0 and not self.started_ns <= now_ns < self.started_ns + int(interval_s * 1e9))

    def encode(self) -> bytes:
        body = _HEAD.pack(
            _MAGIC,
            _FORMAT,
            self.running,
            self.passes,
            self.started_ns,
            self.finished_ns,
            self.chunks,
            self.bytes_read,
            self.found,
            self.repaired,
            self.position,
            len(self.damaged),
        )
        body += b"".join(_DAMAGED.pack(chunk_id, version) for chunk_id, version in self.damaged.items())
        return body + _CHECK.pack(xxh3_64(body))


def decode(data: bytes) -> ScrubRecord | None:
    """None: it is none, or a damaged one."""
    body = data[: -_CHECK.size]
    if len(body) < _HEAD.size or _CHECK.pack(xxh3_64(body)) != data[-_CHECK.size :]:
        return None
    magic, form, running, passes, started, finished, chunks, count, found, repaired, position, damaged = _HEAD.unpack_from(body)
    if magic != _MAGIC or form != _FORMAT or len(body) != _HEAD.size + damaged * _DAMAGED.size:
        return None
    record = ScrubRecord(passes, running, started, finished, chunks, count, found, repaired, b"" if position == _BEGINNING else position)
    record.damaged = dict(_DAMAGED.iter_unpack(body[_HEAD.size :]))
    return record


class Pace:
    """How long to rest after a piece of work, so that the rate is kept and others go first."""

    def __init__(self, bytes_per_s: float) -> None:
        """0: as fast as it goes."""
        self._bytes_per_s = bytes_per_s

    def rest_s(self, count: int, took_s: float) -> float:
        if not self._bytes_per_s:
            return 0.0
        return max(0.0, count / self._bytes_per_s - took_s)
