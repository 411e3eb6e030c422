"""Where a range of a chunk lies in a data file that its service has lent, and reading from there.

A place is a hint with a proof: the checksums that the service had for these bytes when it told the place. Nothing keeps the bytes there; a block that
was freed and used again meanwhile has other bytes, which do not have the checksums. So what is read here is either what the chunk held when the place
was told, or refused (STALE), and then the caller asks the service for the bytes. Whole units are read straight into the caller's memory and checked
there; of a unit wanted only in part, all is read into a buffer of ours. Any thread may read; nothing here waits but for the disk.
"""

from __future__ import annotations

import threading
from enum import Enum, auto
from typing import NamedTuple

from kvfs.client.file.memory import zero
from kvfs.common.checksum import CHECKSUM_UNIT_BYTES, verify
from kvfs.common.errors import KvfsError
from kvfs.common.wire.lending import BorrowedFiles

_UNIT = CHECKSUM_UNIT_BYTES
_SUM_BYTES = 8
_local = threading.local()


class Read(Enum):
    DONE = auto()
    STALE = auto()
    """Other bytes lie there now, or fewer."""
    WAITS = auto()
    """Asked not to wait, and the bytes are not in memory."""


class Place(NamedTuple):
    """Of the bytes [start, end) of a chunk: whole units, the last one may end with the chunk. Beyond `end`, and in a chunk that is not there (end 0),
    are zeros."""

    start: int
    end: int
    files: BorrowedFiles | None
    """None: nothing is stored, all is zeros."""
    file: int
    """The number under which the service lent the file; it is gone when the connection is."""
    file_offset: int
    """Of the byte at `start`."""
    stored: int
    """So many bytes from `start` on lie in the file; up to `end` follow zeros."""
    checksums: bytes

    def read(self, offset: int, into: memoryview, *, nowait: bool = False) -> Read:
        """Fill `into` from `offset` of the chunk on, which is at or after `start`. Not DONE: it may hold anything."""
        behind = offset + len(into)
        if behind > self.end:
            have = max(0, self.end - offset)
            zero(into[have:])
            if not have:
                return Read.DONE
            into, behind = into[:have], self.end
        if offset % _UNIT == 0 and (behind % _UNIT == 0 or behind == self.end):
            return self._units(offset, into, nowait)
        at = offset
        while at < behind:
            unit = at - at % _UNIT
            whole = behind if behind == self.end else behind - behind % _UNIT
            if unit == at and whole > at:
                stop = whole
                outcome = self._units(at, into[at - offset : stop - offset], nowait)
            else:
                stop = min(behind, unit + _UNIT)
                buffer = _buffer()[: min(_UNIT, self.end - unit)]
                outcome = self._units(unit, buffer, nowait)
                into[at - offset : stop - offset] = buffer[at - unit : stop - unit]
            if outcome is not Read.DONE:
                return outcome
            at = stop
        return Read.DONE

    def _units(self, offset: int, into: memoryview, nowait: bool) -> Read:
        skipped = offset - self.start
        size = len(into)
        have = self.stored - skipped
        if have < size:
            have = max(0, have)
            zero(into[have:])
        else:
            have = size
        if have and self.files is not None:
            file = self.files.get(self.file)
            if file is None:
                return Read.STALE
            buffers = (into if have == size else into[:have],)
            try:
                read_into = file.try_read_into if nowait else file.read_into
                count = read_into(buffers, self.file_offset + skipped)
            except KvfsError:
                return Read.STALE  # the service meets the same error, and knows what it means for its disk
            if count is None:
                return Read.WAITS
            if count != have:
                return Read.STALE
        first = skipped // _UNIT * _SUM_BYTES
        sums = self.checksums[first : first + -(-size // _UNIT) * _SUM_BYTES]
        return Read.DONE if verify(into, offset, sums) else Read.STALE


def _buffer() -> memoryview:
    """A unit of memory, one a thread."""
    buffer: memoryview | None = getattr(_local, "unit", None)
    if buffer is None:
        buffer = _local.unit = memoryview(bytearray(_UNIT))
    return buffer
