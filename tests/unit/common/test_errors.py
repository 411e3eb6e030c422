"""The exception tree is total: every class has its own code and an errno, crosses the wire as itself, and stands in the docstring's branches."""

from __future__ import annotations

import errno
import os

import pytest

from kvfs.common import errors
from kvfs.common.errors import BY_CODE, KvfsError, from_os, from_wire


def everything(root: type[KvfsError] = KvfsError) -> list[type[KvfsError]]:
    return [root, *(cls for child in root.__subclasses__() for cls in everything(child))]


OURS = [cls for cls in everything() if cls.__module__ == errors.__name__]
BRANCHES = KvfsError.__subclasses__()


def test_codes_are_unique_and_in_their_branch() -> None:
    codes = [cls.code for cls in OURS]
    assert len(set(codes)) == len(codes) == len([code for code in BY_CODE if BY_CODE[code] in OURS])
    for branch in BRANCHES:
        if branch.__module__ == errors.__name__:
            assert branch.code % 100 == 0
            assert all(cls.code // 100 == branch.code // 100 for cls in everything(branch) if cls in OURS)
            assert branch.__name__ in (errors.__doc__ or "")


@pytest.mark.parametrize("cls", OURS)
def test_each_class(cls: type[KvfsError]) -> None:
    assert "code" in vars(cls), "a code of its own"
    assert cls.errno in errno.errorcode
    back = from_wire(cls.code, "the message")
    assert type(back) is cls and back.message == "the message"
    assert cls().message == cls.__name__


def test_an_unknown_code_is_still_an_error() -> None:
    error = from_wire(9999, "what")
    assert type(error) is KvfsError and "9999" in error.message and "what" in error.message


def test_operating_system_errors() -> None:
    for number, cls in (
        (errno.ENOSPC, errors.NoSpace),
        (errno.EDQUOT, errors.NoSpace),
        (errno.ENOENT, errors.NotFound),
        (errno.EIO, errors.InputOutput),
    ):
        error = from_os(OSError(number, os.strerror(number)), "write x")
        assert type(error) is cls and error.message.startswith("write x: ")
    assert type(from_os(OSError(errno.EXFULL, "?"), "x")) is errors.InputOutput
