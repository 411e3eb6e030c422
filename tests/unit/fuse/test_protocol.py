"""The shapes of messages, and the handshake: sizes as in linux/fuse.h, values where the kernel looks for them."""

from __future__ import annotations

import errno
import os
import struct
from struct import Struct

import pytest

from kvfs.common.errors import MountError
from kvfs.fuse import protocol
from kvfs.fuse.model import Attributes
from kvfs.fuse.protocol import Init, Op
from kvfs.fuse.session import WANTED, Session, negotiate

SECOND = 10**9
SHOWN = Attributes(9, 0o100644, 2, 3, 4, 5, 1 << 40, 6, 4096, -1, 2**33 * SECOND + 1, 7, 2.25, entry_lease_s=1.5)


@pytest.mark.parametrize("shape,size", [
    (protocol.IN_HEADER, 40), (protocol.OUT_HEADER, 16), (protocol.INIT_OUT, 64), (protocol.SETATTR_IN, 88), (protocol.MKNOD_IN, 16),
    (protocol.MKDIR_IN, 8), (protocol.RENAME2_IN, 16), (protocol.CREATE_IN, 16), (protocol.READ_IN, 40), (protocol.WRITE_IN, 40),
    (protocol.ENTRY_OUT, 128), (protocol.ATTRIBUTES_OUT, 104), (protocol.OPEN_OUT, 16), (protocol.STATFS_OUT, 80), (protocol.DIRENT, 24),
    (protocol.INVAL_INODE_OUT, 16 + 24), (protocol.INVAL_ENTRY_OUT, 16 + 16), (protocol.FORGET_ONE, 16), (protocol.HANDLE_IN, 16),
])  # fmt: skip
def test_sizes_are_the_kernels(shape: Struct, size: int) -> None:
    assert shape.size == size


def fields(packed: bytes) -> tuple[int, ...]:
    return struct.unpack("=QQQqqqIIIIIIIIII", packed)


def test_entries_and_attributes_to_the_nanosecond() -> None:
    expected = (9, 1 << 40, 6, -1, 2**33, 0, SECOND - 1, 1, 7, 0o100644, 2, 3, 4, 5, 4096, 0)
    entry = protocol.pack_entry(SHOWN)
    assert struct.unpack_from("=QQQQII", entry) == (9, 0, 1, 2, SECOND // 2, SECOND // 4)
    assert fields(entry[40:]) == expected
    attributes = protocol.pack_attributes(SHOWN)
    assert struct.unpack_from("=QII", attributes) == (2, SECOND // 4, 0)
    assert fields(attributes[16:]) == expected


def test_whole_answers_are_a_header_and_the_body() -> None:
    assert protocol.entry_reply(77, SHOWN) == protocol.reply(77, protocol.pack_entry(SHOWN))
    assert protocol.attribute_reply(77, SHOWN) == protocol.reply(77, protocol.pack_attributes(SHOWN))
    assert struct.unpack("=IiQ", protocol.error_reply(5, errno.ENOENT)) == (16, -errno.ENOENT, 5)
    absent = protocol.absent_reply(5, 0.5)
    assert struct.unpack_from("=IiQQQQQII", absent) == (16 + 128, 0, 5, 0, 0, 0, 0, SECOND // 2, 0)


def test_listings_are_padded_to_eight_bytes() -> None:
    for name in (b"a", b"12345678", b"n" * 255):
        record = protocol.pack_dirent(4, 0o040755, name, 3)
        assert len(record) % 8 == 0
        assert protocol.DIRENT.unpack_from(record) == (4, 3, len(name), 4)
        assert record[24 : 24 + len(name)] == name


def test_notifications() -> None:
    assert struct.unpack("=IiQQqq", protocol.inval_inode(6, attributes_only=False)) == (40, 2, 0, 6, 0, 0)
    assert struct.unpack("=IiQQqq", protocol.inval_inode(6, attributes_only=True)) == (40, 2, 0, 6, -1, 0)
    assert protocol.inval_entry(6, b"name", expire_only=True) == struct.pack("=IiQQII", 37, 3, 0, 6, 4, 1) + b"name\0"
    assert protocol.inc_epoch() == struct.pack("=IiQ", 16, 8, 0)


def greeting(minor: int, flags: int, *, major: int = 7, op: int = Op.INIT) -> bytes:
    body = struct.pack("=IIIIIIII", major, minor, 1 << 17, flags & 0xFFFFFFFF, flags >> 32, 0, 0, 0)
    return protocol.IN_HEADER.pack(protocol.HEADER_BYTES + len(body), op, 42, 0, 0, 0, 0, 0, 0) + body


def test_handshake_agrees_on_what_both_know() -> None:
    everything = (1 << 45) - 1
    answer, minor, agreed = negotiate(greeting(99, everything), 64)
    assert (minor, agreed) == (protocol.VERSION_MINOR, WANTED)
    length, error, unique, major, own, ahead, low, background, congestion, write_max, granularity, pages, _, high, *_ = struct.unpack(
        "=IiQIIIIHHIIHHIIH22x", answer
    )
    assert (length, error, unique, major, own) == (len(answer), 0, 42, 7, protocol.VERSION_MINOR)
    assert low | high << 32 == WANTED and write_max == 1 << 20 and pages == 257
    assert (ahead, background, congestion, granularity) == (1 << 17, 64, 48, 1)
    _, minor, agreed = negotiate(greeting(31, int(Init.ASYNC_READ | Init.HAS_EXPIRE_ONLY)), 64)
    assert (minor, agreed) == (31, Init.ASYNC_READ), "without INIT_EXT there are no flags above bit 31"


def test_handshake_refuses_strangers() -> None:
    for wrong in (greeting(31, 0, major=8), greeting(31, 0, op=Op.LOOKUP)):
        with pytest.raises(MountError):
            negotiate(wrong, 64)


def test_what_a_session_can_do_hangs_on_the_kernel() -> None:
    reader, writer = os.pipe()
    session = Session(writer, "/nowhere")
    try:
        for session.minor, session.flags in ((43, Init.HAS_EXPIRE_ONLY), (44, Init.ASYNC_READ)):
            assert not session.takes_names_back()
        session.minor, session.flags = 44, Init.HAS_EXPIRE_ONLY
        assert session.takes_names_back()
        assert os.read(reader, 100) == protocol.inc_epoch()
        os.close(reader)
        assert not session.takes_names_back(), "what the kernel refuses it cannot do"
    finally:
        session.close()
