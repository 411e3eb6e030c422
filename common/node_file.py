"""node.json: what a service's data directory says about whose it is.

Invariants: written once, when the directory is new, and never changed after (a damaged one may be written again as it was); a directory of another
cluster, another role or a newer format is refused before anything in it is touched. The uuid is what makes a node the same node after a restart: the
file carries its checksum, since a flipped bit must not make another node of it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Final

from kvfs.common.boundary.disk import Disk
from kvfs.common.boundary.random import Random
from kvfs.common.checksum import xxh3_64
from kvfs.common.errors import FormatTooNew, WrongDataDirectory

NAME: Final = "node.json"
FORMAT: Final = 1


@dataclass(frozen=True, slots=True)
class NodeFile:
    cluster_id: str
    role: str
    node_uuid: str
    format: int = FORMAT

    def encode(self) -> bytes:
        fields = {"format": self.format, "cluster_id": self.cluster_id, "role": self.role, "node_uuid": self.node_uuid, "check": self._check()}
        return (json.dumps(fields, indent=2) + "\n").encode()

    def _check(self) -> str:
        return f"{xxh3_64(f'{self.format}/{self.cluster_id}/{self.role}/{self.node_uuid}'.encode()):016x}"


def read_node_file(disk: Disk, *, where: str) -> NodeFile | None:
    """What the directory says, None when it is new. `where` names it for messages."""
    if not disk.exists(NAME):
        return None
    try:
        fields = json.loads(disk.read_file(NAME))
        number = fields["format"]
        if isinstance(number, int) and number > FORMAT:
            # The checksum is that of our own format: only the number has flipped bits, no newer kvfs wrote this.
            if "check" in fields and fields["check"] == _parsed(fields, FORMAT)._check():
                raise ValueError("it does not have its checksum")
            raise FormatTooNew(f"{where} was written by a newer kvfs (format {number}, this one knows {FORMAT}): upgrade kvfs; nothing was touched")
        found = _parsed(fields, int(number))
        if "check" in fields and fields["check"] != found._check():  # files of the first versions have none
            raise ValueError("it does not have its checksum")
        return found
    except (ValueError, KeyError, TypeError) as error:
        raise WrongDataDirectory(f"{where}/{NAME} is not a node file ({error}): is this a kvfs data directory? Nothing was touched") from None


def _parsed(fields: dict[str, Any], number: int) -> NodeFile:
    return NodeFile(str(fields["cluster_id"]), str(fields["role"]), str(fields["node_uuid"]), number)


def check_empty(disk: Disk, *, where: str) -> None:
    """A directory without a node file may become one of ours only if nobody has anything in it."""
    strangers = sorted(set(disk.list("")) - {"LOCK", "lost+found"})
    if strangers:
        raise WrongDataDirectory(
            f"{where} holds {strangers[0]!r} but no {NAME}: name an empty directory, or restore {NAME} from a copy; nothing was touched"
        )


def open_node_file(disk: Disk, random: Random, *, where: str, role: str, cluster_id: str) -> NodeFile:
    """The directory's node file, checked against what the caller is, or a new one. Lock the directory first. `cluster_id` empty: any."""
    found = read_node_file(disk, where=where)
    if found is None:
        check_empty(disk, where=where)
        new = NodeFile(cluster_id, role, random.bytes(16).hex())
        disk.write_file(NAME, new.encode())
        return new
    if found.role != role:
        raise WrongDataDirectory(
            f"{where} belongs to a {found.role} service, not to a {role} service: give each its own directory; nothing was touched"
        )
    if cluster_id and found.cluster_id and found.cluster_id != cluster_id:
        raise WrongDataDirectory(f"{where} belongs to cluster {found.cluster_id!r}, not {cluster_id!r}: nothing was touched")
    return found
