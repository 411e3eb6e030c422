"""open, close, fsync, append: permissions, sessions, exact lengths."""

from __future__ import annotations

import errno

import pytest
from tests.unit.meta.namespace.tree import OTHER, OWNER, ROOT, Tree, fails, updates

from kvfs.common.wire import meta_pb2 as pb
from kvfs.meta.namespace import files, keys

S1, S2 = b"1" * 16, b"2" * 16


def append(tree: Tree, number: int, length: int, session: bytes = b"", who: pb.User = ROOT) -> pb.AppendReply:
    return tree.run(files.append, pb.AppendRequest(inode=number, session=session, length=length), who)


@pytest.mark.parametrize("mode", [0o000, 0o400, 0o200, 0o600])
def test_open_checks_the_mode(tree: Tree, mode: int) -> None:
    tree.create("/f", mode, OWNER)
    for fields, mask in (({"read": True}, 0o400), ({"write": True}, 0o200), ({"read": True, "write": True}, 0o600), ({"truncate": True}, 0o200)):
        if mode & mask == mask:
            tree.open("/f", OWNER, session=S1, **fields)
        else:
            with updates(tree, "/f"), fails(errno.EACCES):
                tree.open("/f", OWNER, session=S1, **fields)
        tree.open("/f", ROOT, session=S2, **fields)


def test_open_of_other_kinds(tree: Tree) -> None:
    tree.mkdir("/d")
    tree.symlink("x", "/l")
    tree.make("/p", pb.FIFO)
    tree.open("/d", read=True)
    for fields in ({"write": True, "session": S1}, {"truncate": True}):
        with fails(errno.EISDIR):
            tree.open("/d", **fields)
    with fails(errno.ELOOP):
        tree.run(files.open_file, pb.OpenRequest(inode=tree.stat("/l").inode, read=True))
    assert tree.open("/p", write=True, session=S1).writers == 0
    with fails(errno.ESTALE):
        tree.run(files.open_file, pb.OpenRequest(inode=999, read=True))


def test_open_with_truncate(tree: Tree) -> None:
    tree.create("/f")
    tree.write("/f", 100)
    with updates(tree, "/f", ctime=True, mtime=True):
        opened = tree.open("/f", write=True, truncate=True, session=S1)
    assert (opened.length, opened.truncate_version) == (0, 1)


def test_writers_are_counted(tree: Tree) -> None:
    number = tree.create("/f", write=True, session=S1).inode
    assert tree.open("/f", write=True, session=S2).writers == 2
    assert tree.close(number, S1).writers == 1
    assert tree.close(number, S1).writers == 1
    assert tree.close(number, S2).writers == 0


def test_close_reports_what_was_written(tree: Tree) -> None:
    number = tree.create("/f", write=True, session=S1).inode
    with updates(tree, "/f", ctime=True, mtime=True):
        assert tree.close(number, wrote=True, length=5000, still_open=True, session=S1).length == 5000
    assert tree.getattr(number).writers == 1
    with updates(tree, "/f"):
        tree.close(number, still_open=True, session=S1)
    with updates(tree, "/f", ctime=True, mtime=True):
        closed = tree.close(number, S1, wrote=True, length=100, mtime_ns=tree.now_ns + 10)
    assert (closed.length, closed.writers) == (5000, 0)  # what others reported is not cut
    assert closed.data_version == 2
    with updates(tree, "/f"):
        tree.close(number, S1)


def test_the_time_of_the_last_write_is_taken(tree: Tree) -> None:
    number = tree.create("/f").inode
    assert tree.close(number, wrote=True, length=1, mtime_ns=1234567).mtime_ns == 1234567


def test_a_report_needs_the_session_or_the_right(tree: Tree) -> None:
    number = tree.create("/f", 0o644, OWNER, write=True, session=S1).inode
    with fails(errno.EACCES):
        tree.close(number, b"", OTHER, wrote=True, length=9)
    tree.close(number, S1, OTHER, wrote=True, length=9)  # the session was given to who may write


def test_a_report_from_before_a_truncate_asks_the_chains(tree: Tree) -> None:
    number = tree.create("/f", write=True, session=S1).inode
    tree.truncate("/f", 10)
    request = pb.CloseRequest(inode=number, session=S1, wrote=True, length=9000, truncate_version=0)
    tree.run(files.close, request)
    assert tree.last is not None and tree.last.measure == number
    assert tree.getattr(number).length == 10
    reply = tree.run(lambda step, asked: files.close(step, asked, measured=700), request)
    assert (reply.inode.length, reply.inode.writers) == (700, 0)


def test_an_uncertain_write_asks_the_chains(tree: Tree) -> None:
    number = tree.create("/f", write=True, session=S1).inode
    request = pb.CloseRequest(inode=number, session=S1, uncertain=True, length=100)
    tree.run(files.close, request)
    assert tree.last is not None and tree.last.measure == number
    reply = tree.run(lambda step, asked: files.close(step, asked, measured=4096), request)
    assert reply.inode.length == 4096
    assert reply.inode.chunks_possible


def test_writing_drops_privileges(tree: Tree) -> None:
    number = tree.create("/f", 0o6777, OWNER).inode
    assert tree.close(number, wrote=True, length=1).mode == 0o6777
    assert tree.close(number, b"", OTHER, wrote=True, length=1).mode == 0o777


def test_close_of_a_file_that_is_gone(tree: Tree) -> None:
    tree.put(lambda txn: txn.set(keys.session(777, S1), b"\1"))
    assert tree.close(777, S1).type == pb.TYPE_INVALID
    assert tree.put(lambda txn: txn.get(keys.session(777, S1))) is None


# --- append


def test_appends_do_not_overlap(tree: Tree) -> None:
    number = tree.create("/f").inode
    places = []
    for length in (10, 5, 100, 0, 1):
        with updates(tree, "/f", ctime=length > 0, mtime=length > 0):
            places.append(append(tree, number, length).offset)
    assert places == [0, 10, 15, 115, 115]
    assert tree.stat("/f").length == 116
    assert tree.stat("/f").chunks_possible


def test_append_needs_the_session_or_the_right(tree: Tree) -> None:
    number = tree.create("/f", 0o644, OWNER, write=True, session=S1).inode
    append(tree, number, 1, S1, OTHER)
    with fails(errno.EACCES):
        append(tree, number, 1, b"", OTHER)
    with fails(errno.EBADF):
        append(tree, number, 1, S2, OWNER)
    with fails(errno.EINVAL):
        append(tree, 1, 1)
    tree.truncate("/f", (1 << 63) - 5)
    with fails(errno.EFBIG):
        append(tree, number, 5)
    assert append(tree, number, 4).offset == (1 << 63) - 5


def test_a_time_set_by_hand_outlasts_the_report_of_earlier_writes(tree: Tree) -> None:
    number = tree.create("/f", write=True, session=S1).inode
    written_ns = tree.now_ns
    tree.setattr("/f", mtime_ns=77)
    closed = tree.close(number, S1, wrote=True, length=10, mtime_ns=written_ns)
    assert (closed.mtime_ns, closed.length) == (77, 10)
    assert tree.close(number, b"", wrote=True, length=11, mtime_ns=tree.now_ns).mtime_ns == tree.now_ns - 10**9
