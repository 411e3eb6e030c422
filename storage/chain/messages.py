"""What goes into the core and what comes out of it: updates, what the engine holds, results, and effects.

Plain values; an effect names what its driver must do and tell the core about afterwards. `Flight` (flight.py) is the only thing with state.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from kvfs.common import errors
from kvfs.common.values import value
from kvfs.storage.engine.requests import UpdateKind

if TYPE_CHECKING:
    from kvfs.storage.chain.flight import Flight

_RECORDED = struct.Struct("<Q")
RECORD_BYTES = _RECORDED.size

CLEAN_REFUSALS = frozenset(
    error.code
    for error in (errors.NoSpace, errors.FileTooBig, errors.InvalidArgument, errors.BadRequest, errors.ChecksumMismatch, errors.QuotaExceeded)
)
"""Statuses that promise: neither this replica nor any after it holds the update. Only such an answer lets a predecessor forget it."""


@value
class TagKey:
    client_id: bytes
    channel: int
    sequence: int


@value
class Incoming:
    """An update as it arrived."""

    chunk_id: bytes
    kind: UpdateKind
    chain_version: int
    length: int = 0
    tag: TagKey | None = None
    from_target: int = 0
    """0: a client; else the predecessor."""
    update_version: int = 0
    """Forwards: the version that the head gave."""
    sequence: int = 0
    """Forwards: the predecessor's count; of one chunk, a lower one that comes after a higher one is late and void."""
    whole: bool = False
    """It leaves nothing of what was there before: the chunk is as long as its file's chunks are."""
    turn: int = 0
    """Of a truncation: of one inode, a lower one that comes after a higher one is late and void. 0: none."""
    roomy: bool = True
    """The disk surely has room: forwarding may begin before the local copy is written."""


@value
class Stored:
    """What the engine holds of a chunk, read under the chunk's lock."""

    version: int = 0
    length: int = 0
    checksum: int = 0
    pending_version: int = 0
    pending_length: int = 0
    pending_checksum: int = 0
    pending_removes: bool = False
    tag_sequence: int = -1
    """Of the update's (client, channel); -1: none is recorded."""
    tag_result: bytes = b""


ABSENT = Stored()


@value
class Result:
    status: int = 0
    version: int = 0
    chain_version: int = 0
    length: int = 0
    checksum: int = 0
    message: str = ""

    @property
    def clean(self) -> bool:
        return self.status in CLEAN_REFUSALS


def record_of(update_version: int) -> bytes:
    """What is kept with an idempotency tag: the version that the update made. Known before the update is written, equal on every replica."""
    return _RECORDED.pack(update_version)


def newer(tag: TagKey, known_sequence: int) -> bool:
    """Whether a channel's record is to become this tag's: a record never goes back, whatever order updates end in."""
    return tag.sequence > known_sequence


def from_record(record: bytes, chain_version: int, stored: Stored) -> Result:
    """The answer to a duplicate; length and checksum only while the chunk still is as that update left it."""
    (version,) = _RECORDED.unpack(record)
    if version == stored.version:
        return Result(0, version, chain_version, stored.length, stored.checksum)
    return Result(0, version, chain_version)


def refusal(error: errors.KvfsError | type[errors.KvfsError], chain_version: int, message: str = "") -> Result:
    text = message or (error.message if isinstance(error, errors.KvfsError) else error.__name__)
    return Result(status=error.code, chain_version=chain_version, message=text)


# --- effects of one update: the driver carries them out and answers with the event named ---------------------------------------------


@value
class Prepare:
    """Write the pending version. -> prepared / prepare_failed"""

    flight: Flight


@value
class Apply:
    """Write and commit in one step. -> applied / prepare_failed"""

    flight: Flight
    forced: bool = False
    """Whatever is there, also a newer version: the predecessor of a target that syncs is right."""


@value
class Forward:
    """Send the update on, as `kind` (REPLACE: the whole chunk as it is after the update). -> forwarded / forward_failed"""

    flight: Flight
    target_id: int
    kind: UpdateKind
    chain_version: int
    sequence: int
    syncing: bool


@value
class Commit:
    """Make the pending version the committed one. -> committed / commit_failed"""

    flight: Flight


@value
class Drop:
    """Forget the pending version. No answer."""

    flight: Flight


@value
class Reply:
    """The update is over: answer, release the chunk's lock."""

    flight: Flight
    result: Result


@value
class Wait:
    """Nothing to do until the chain changes or a short time has passed. -> resume. `refresh`: somebody knows a newer chain, ask for it now."""

    flight: Flight
    refresh: bool


# --- effects of the target ------------------------------------------------------------------------------------------------------------


@value
class Report:
    """The local state changed: send a heartbeat now."""


@value
class ResolveLeftovers:
    """Every pending version that no update under way owns: take its lock and call recover()."""


@value
class DropLeftovers:
    """Forget every pending version that no update under way owns."""


@value
class StartResync:
    """Bring the successor up to date; a resync of an older chain version ends."""

    target_id: int
    chain_version: int


@value
class StopResync:
    pass


@value
class Exit:
    """The cluster went on without this target while it thought it served: the process must end."""

    reason: str


FlightEffect = Prepare | Apply | Forward | Commit | Drop | Reply | Wait | Report
TargetEffect = Report | ResolveLeftovers | DropLeftovers | StartResync | StopResync | Exit
