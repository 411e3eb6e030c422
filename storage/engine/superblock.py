"""The superblock of a target directory: whose it is and in which format.

One small file, `superblock`, written once when the target is made and never changed. It is read before anything else is touched: a
directory of another cluster, target or node is WrongDataDirectory, a newer format FormatTooNew, and nothing in it changes.
Layout (docs/format.md, "Superblock"): magic, format, target id, node uuid, cluster id, XXH3-64 of all that.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from kvfs.common.boundary.disk import Disk
from kvfs.common.checksum import almost, xxh3_64
from kvfs.common.errors import FormatTooNew, WrongDataDirectory

FILE_NAME = "superblock"
FORMAT = 1
_MAGIC = b"kvfs-tgt"
_FIXED = struct.Struct(
    "<8sIIQ16sH"
)  # magic, format, zero, target id, node uuid, length of the cluster id; the cluster id (UTF-8) and the check follow
_CHECK = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class Superblock:
    cluster_id: str
    target_id: int
    node_uuid: bytes = bytes(16)
    """16 bytes; all zeros: not bound to a node."""

    def encode(self) -> bytes:
        name = self.cluster_id.encode()
        body = _FIXED.pack(_MAGIC, FORMAT, 0, self.target_id, self.node_uuid, len(name)) + name
        return body + _CHECK.pack(xxh3_64(body))


def decode(data: bytes) -> Superblock:
    """Format before check: a newer format may have another layout behind its first 12 bytes."""
    if data[:8] != _MAGIC or len(data) < 12:
        raise WrongDataDirectory("the directory's superblock is not one of a kvfs target: point the target at an empty directory")
    (form,) = struct.unpack_from("<I", data, 8)
    if form > FORMAT:
        raise FormatTooNew(f"the target was written in format {form}, this kvfs knows up to {FORMAT}: upgrade kvfs; nothing was touched")
    try:
        _, _, _, target_id, node_uuid, length = _FIXED.unpack_from(data)
        end = _FIXED.size + length
        (check,) = _CHECK.unpack_from(data, end)
        if check != xxh3_64(data[:end]) or len(data) != end + _CHECK.size:
            raise WrongDataDirectory("the target's superblock is damaged: restore the file from a backup or make the target anew")
        return Superblock(data[_FIXED.size : end].decode(), target_id, node_uuid)
    except (struct.error, UnicodeDecodeError) as error:
        raise WrongDataDirectory(f"the target's superblock is damaged ({error}): restore the file from a backup or make the target anew") from error


def load(disk: Disk, wanted: Superblock | None = None) -> Superblock | None:
    """The directory's superblock; None when it has none (a new target). `wanted`: what it should be; a few flipped bits are seen through."""
    if not disk.exists(FILE_NAME):
        return None
    data = disk.read_file(FILE_NAME)
    return wanted if wanted is not None and almost(data, wanted.encode()) else decode(data)


def intact(disk: Disk, identity: Superblock) -> bool:
    """Whether the file is what `identity` made."""
    return disk.exists(FILE_NAME) and disk.read_file(FILE_NAME) == identity.encode()


def write(disk: Disk, identity: Superblock) -> None:
    disk.write_file(FILE_NAME, identity.encode())


def settle(disk: Disk, wanted: Superblock) -> None:
    """Check the directory's superblock against ours, or write ours into an empty directory.

    A directory that has other files but no superblock is refused: it may be somebody's data.
    """
    found = load(disk, wanted)
    if found is None:
        strangers = [name for name in disk.list("") if name not in ("LOCK", "lost+found")]
        if strangers:
            raise WrongDataDirectory(
                f"the target's directory holds {sorted(strangers)[0]!r} but no superblock: point the target at an empty directory"
            )
        write(disk, wanted)
        return
    for what, ours, theirs in (
        ("cluster", wanted.cluster_id, found.cluster_id),
        ("target", wanted.target_id, found.target_id),
        ("node", wanted.node_uuid.hex(), found.node_uuid.hex()),
    ):
        if ours != theirs:
            raise WrongDataDirectory(f"the target's directory belongs to {what} {theirs}, not {ours}: check the configuration; nothing was touched")
    if not intact(disk, wanted):
        write(disk, wanted)  # a few bits of it were flipped
