"""The adapter's guard: every error becomes an errno, and nothing else ever reaches pyfuse3."""

from __future__ import annotations

import errno
from typing import Any

import pytest
import trio

pyfuse3 = pytest.importorskip("pyfuse3")

from kvfs.common.errors import (  # noqa: E402
    BY_CODE,
    AccessDenied,
    ConnectionLost,
    DeadlineExceeded,
    KvfsError,
    NotFound,
    Overloaded,
)
from kvfs.fuse.loop import KernelOperations, entry_of, errno_of  # noqa: E402
from kvfs.fuse.model import Attributes  # noqa: E402


def guarded(call: Any, deadline_s: float = 5.0) -> int:
    """The errno that pyfuse3 would answer; 0 for success."""

    async def main() -> int:
        operations = KernelOperations(None, deadline_s=deadline_s)  # type: ignore[arg-type]
        try:
            await operations._guard("test", call())
        except pyfuse3.FUSEError as error:
            return int(error.errno)
        return 0

    return trio.run(main)


@pytest.mark.parametrize("error,number", [
    (NotFound("x"), errno.ENOENT), (AccessDenied("x"), errno.EACCES), (DeadlineExceeded("x"), errno.ETIMEDOUT), (ConnectionLost("x"),
    errno.ECONNRESET),
    (Overloaded("x"), errno.EIO), (ValueError("x"), errno.EIO), (KeyError("x"), errno.EIO), (OSError(errno.ENOENT, "x"), errno.EIO),
    (ExceptionGroup("g", [ValueError("x"), NotFound("y")]), errno.ENOENT), (ExceptionGroup("g", [ExceptionGroup("h", [KeyError("x")])]), errno.EIO),
])  # fmt: skip
def test_errors_become_errno(error: Exception, number: int) -> None:
    async def fails() -> None:
        raise error

    assert guarded(fails) == number


def test_every_class_of_the_tree_has_an_errno_and_none_says_try_again() -> None:
    for cls in BY_CODE.values():
        assert errno_of(cls("x")) > 0
        assert errno_of(cls("x")) != errno.EAGAIN
    assert errno_of(KvfsError("x")) == errno.EIO


def test_operation_that_does_not_end_times_out() -> None:
    assert guarded(trio.sleep_forever, deadline_s=0.05) == errno.ETIMEDOUT


def test_success_passes_through() -> None:
    async def works() -> int:
        return 3

    assert guarded(works) == 0


def test_cancel_of_the_mount_is_not_swallowed() -> None:
    async def main() -> bool:
        operations = KernelOperations(None, deadline_s=5.0)  # type: ignore[arg-type]
        with trio.move_on_after(0.05) as scope:
            await operations._guard("test", trio.sleep_forever())
        return scope.cancelled_caught

    assert trio.run(main)


def test_attributes_are_converted_to_the_nanosecond() -> None:
    second = 10**9
    attributes = Attributes(9, 0o100644, 2, 3, 4, 5, 1 << 40, 6, 4096, -1, 2**33 * second + 1, 7, 0.25)
    entry = entry_of(attributes)
    assert (entry.st_ino, entry.st_mode, entry.st_nlink, entry.st_uid, entry.st_gid, entry.st_rdev) == (9, 0o100644, 2, 3, 4, 5)
    assert (entry.st_size, entry.st_blocks, entry.st_blksize) == (1 << 40, 6, 4096)
    assert (entry.st_atime_ns, entry.st_mtime_ns, entry.st_ctime_ns) == (-1, 2**33 * second + 1, 7)
    assert entry.entry_timeout == 0 and entry.attr_timeout == 0.25
