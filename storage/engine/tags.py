"""Idempotency records of a target: the last sequence and result of every (client, channel), bounded in number and age.

They are rows of the index (docs/format.md, "Tag row") and all of them are in memory. Age is counted on the monotonic clock, from the last use
or from the opening of the target: wall time decides nothing. Called under the engine's lock.
"""

from __future__ import annotations

import struct
from collections import OrderedDict

from kvfs.common.boundary.clock import Clock
from kvfs.common.checksum import xxh3_64
from kvfs.common.errors import IndexCorrupt, InvalidArgument
from kvfs.storage.engine.requests import Tag

PREFIX = b"t"
MAX_RESULT_BYTES = 1024
_KEY = struct.Struct(">16sI")
_VALUE = struct.Struct("<QI")  # sequence; check: the low 32 bits of XXH3-64 over key, sequence and result; the result follows
_OLD_VALUE = struct.Struct("<Q8s")


def key_of(client_id: bytes, channel: int) -> bytes:
    if len(client_id) != 16 or not 0 <= channel < 1 << 32:
        raise InvalidArgument(f"a tag needs a client id of 16 bytes and a channel of 32 bits, got {len(client_id)} bytes and {channel}")
    return PREFIX + _KEY.pack(client_id, channel)


def encode(tag: Tag) -> bytes:
    if len(tag.result) > MAX_RESULT_BYTES:
        raise InvalidArgument(f"the result of a tag has {len(tag.result)} bytes, at most {MAX_RESULT_BYTES} are kept")
    return _VALUE.pack(tag.sequence, _check(key_of(tag.client_id, tag.channel), tag.sequence, tag.result)) + tag.result


def _check(key: bytes, sequence: int, result: bytes) -> int:
    return xxh3_64(key + sequence.to_bytes(8, "little") + result) & 0xFFFFFFFF


def decode(key: bytes, value: bytes) -> Tag:
    try:
        client_id, channel = _KEY.unpack(key[1:])
        sequence, check = _VALUE.unpack_from(value)
        result = value[_VALUE.size :]
        if check != _check(key, sequence, result):
            if len(value) != _OLD_VALUE.size:
                raise IndexCorrupt(f"the tag row {key.hex()} of the index is damaged. {IndexCorrupt.ADVICE}")
            sequence, result = _OLD_VALUE.unpack(value)  # written by the first versions
    except struct.error as error:
        raise IndexCorrupt(f"the index has a damaged tag row {key.hex()}: {error}") from error
    return Tag(client_id, channel, sequence, result)


class Tags:
    def __init__(self, clock: Clock, limit: int, age_s: float) -> None:
        self._clock = clock
        self._limit = limit
        self._age_s = age_s
        self._kept: OrderedDict[bytes, tuple[Tag, float]] = OrderedDict()
        """Least recently used first; with the time of the last use."""

    def load(self, key: bytes, value: bytes) -> None:
        self._kept[key] = (decode(key, value), self._clock.monotonic())

    def get(self, client_id: bytes, channel: int) -> Tag | None:
        found = self._kept.get(key_of(client_id, channel))
        return found[0] if found else None

    def all(self) -> list[Tag]:
        return [tag for tag, _ in self._kept.values()]

    def rows(self, tags: list[Tag]) -> dict[bytes, bytes | None]:
        """The index rows that record these tags and let go of what is too much. Nothing changes before `put`."""
        rows: dict[bytes, bytes | None] = {key_of(tag.client_id, tag.channel): encode(tag) for tag in tags}
        too_many = len(self._kept) + sum(key not in self._kept for key in rows) - self._limit
        if too_many > 0:
            for key in list(self._kept)[:too_many]:
                rows.setdefault(key, None)
        return rows

    def put(self, rows: dict[bytes, bytes | None]) -> None:
        """The rows are in the journal."""
        now = self._clock.monotonic()
        for key, value in rows.items():
            if value is None:
                self._kept.pop(key, None)
            else:
                self._kept[key] = (decode(key, value), now)
                self._kept.move_to_end(key)

    def expired(self) -> dict[bytes, bytes | None]:
        """Rows that remove what is too old."""
        oldest = self._clock.monotonic() - self._age_s
        rows: dict[bytes, bytes | None] = {}
        for key, (_, used) in self._kept.items():
            if used >= oldest:
                break
            rows[key] = None
        return rows
