"""node.json: whose a data directory is."""

from __future__ import annotations

import json

import pytest

from kvfs.common.boundary.random import SeededRandom
from kvfs.common.checksum import xxh3_64
from kvfs.common.errors import FormatTooNew, WrongDataDirectory
from kvfs.common.node_file import FORMAT, NAME, NodeFile, open_node_file, read_node_file
from kvfs.common.sim.disk import SimDisk

RANDOM = SeededRandom(1)


def test_a_new_directory_is_marked_and_stays_the_same_node() -> None:
    disk = SimDisk()
    assert read_node_file(disk, where="d") is None
    made = open_node_file(disk, RANDOM, where="d", role="storage", cluster_id="c")
    assert (made.cluster_id, made.role, made.format, len(made.node_uuid)) == ("c", "storage", FORMAT, 32)
    assert open_node_file(disk, RANDOM, where="d", role="storage", cluster_id="c") == made
    assert open_node_file(disk, RANDOM, where="d", role="storage", cluster_id="") == made
    disk.crash()
    assert read_node_file(disk.reopen(), where="d") == made


@pytest.mark.parametrize(("role", "cluster_id", "text"), [("meta", "c", "to a storage service"), ("storage", "x", "to cluster 'c', not 'x'")])
def test_others_directories_are_refused_and_untouched(role: str, cluster_id: str, text: str) -> None:
    disk = SimDisk()
    open_node_file(disk, RANDOM, where="d", role="storage", cluster_id="c")
    before = disk.read_file(NAME)
    with pytest.raises(WrongDataDirectory, match=text):
        open_node_file(disk, RANDOM, where="d", role=role, cluster_id=cluster_id)
    assert disk.read_file(NAME) == before


def test_a_newer_format_is_refused() -> None:
    disk = SimDisk()
    disk.write_file(NAME, json.dumps({"format": FORMAT + 1, "something": "else"}).encode())
    with pytest.raises(FormatTooNew, match="upgrade kvfs; nothing was touched"):
        open_node_file(disk, RANDOM, where="d", role="storage", cluster_id="c")


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[]", b"7", b'{"format": 1}', b'{"format": "x", "cluster_id": "", "role": "", "node_uuid": ""}', b"\xff\xfe"]
)
def test_what_is_no_node_file_is_refused(data: bytes) -> None:
    disk = SimDisk()
    disk.write_file(NAME, data)
    with pytest.raises(WrongDataDirectory, match="is not a node file"):
        open_node_file(disk, RANDOM, where="d", role="storage", cluster_id="c")
    assert disk.read_file(NAME) == data


def test_what_is_written_is_what_is_documented() -> None:
    fields = json.loads(NodeFile("c", "meta", "u").encode())
    check = f"{xxh3_64(b'1/c/meta/u'):016x}"
    assert fields == {"format": 1, "cluster_id": "c", "role": "meta", "node_uuid": "u", "check": check}


def test_any_flipped_bit_is_seen() -> None:
    """Or makes no difference. Files of the first versions have no checksum, and are read."""
    made = NodeFile("c", "meta", "u" * 32)
    data = made.encode()
    seen = 0
    for bit in range(len(data) * 8):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        disk = SimDisk()
        disk.write_file(NAME, bytes(damaged))
        try:
            assert read_node_file(disk, where="d") == made, damaged
        except WrongDataDirectory:
            seen += 1
    assert seen > 6 * len(data)
    disk.write_file(NAME, json.dumps({"format": 1, "cluster_id": "c", "role": "meta", "node_uuid": "u" * 32}).encode())
    assert read_node_file(disk, where="d") == made


def test_a_directory_with_something_in_it_is_not_taken_for_a_new_one() -> None:
    """Somebody's files, or a data directory whose node.json was lost: a new one would make it another node's."""
    disk = SimDisk()
    disk.makedirs("targets")
    with pytest.raises(WrongDataDirectory, match=r"holds .targets. but no node\.json"):
        open_node_file(disk, RANDOM, where="d", role="storage", cluster_id="c")
    assert disk.list("") == ["targets"]
