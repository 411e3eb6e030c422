"""What every call that takes a path answers when the path itself is wrong: ENOTDIR, ENOENT, EACCES, ELOOP, ENAMETOOLONG, for each call alike."""

from __future__ import annotations

import errno
import os
from typing import Any

import pytest
from tests.mount.agent import Agent
from tests.mount.posix.conftest import OWNER, Posix

# name -> (call, arguments with the path in the place of PATH; FILE stands for an existing file beside the test's directory)
PATH, FILE = object(), object()

ON_EXISTING: dict[str, tuple[str, tuple[Any, ...]]] = {
    "open": ("create", (PATH, os.O_RDONLY)),
    "stat": ("stat", (PATH,)),
    "lstat": ("lstat", (PATH,)),
    "chmod": ("chmod", (PATH, 0o644)),
    "chown": ("chown", (PATH, -1, -1)),
    "lchown": ("lchown", (PATH, -1, -1)),
    "truncate": ("truncate", (PATH, 0)),
    "utimensat": ("utimensat", (PATH, None)),
    "unlink": ("unlink", (PATH,)),
    "rmdir": ("rmdir", (PATH,)),
    "readlink": ("readlink", (PATH,)),
    "link_from": ("link", (PATH, FILE)),
    "rename_from": ("rename", (PATH, FILE)),
    "listdir": ("listdir", (PATH,)),
    "getxattr": ("getxattr", (PATH, b"user.none")),
}
ON_NEW: dict[str, tuple[str, tuple[Any, ...]]] = {
    "creat": ("create", (PATH, os.O_CREAT | os.O_WRONLY)),
    "creat_excl": ("create", (PATH, os.O_CREAT | os.O_EXCL | os.O_RDWR)),
    "mkdir": ("mkdir", (PATH, 0o755)),
    "mkfifo": ("mkfifo", (PATH, 0o644)),
    "mknod": ("mknod", (PATH, 0o100644)),
    "symlink": ("symlink", (b"somewhere", PATH)),
    "link_to": ("link", (FILE, PATH)),
    "rename_to": ("rename", (FILE, PATH)),
}
ALL = {**ON_EXISTING, **ON_NEW}


def attempt(posix: Posix, agent: Agent, what: str, path: bytes, expected: int | tuple[int, ...]) -> None:
    call, arguments = ALL[what]
    file = posix.make("file") if what.endswith(("_to",)) else posix.name()
    posix.expect(expected, agent, call, *(path if argument is PATH else file if argument is FILE else argument for argument in arguments))


@pytest.mark.parametrize("kind", ["file", "fifo", "char", "socket"])
@pytest.mark.parametrize("what", ALL)
def test_component_that_is_no_directory(posix: Posix, what: str, kind: str) -> None:
    attempt(posix, posix.root, what, posix.make(kind) + b"/below", errno.ENOTDIR)


@pytest.mark.parametrize("what", ALL)
def test_component_that_is_missing(posix: Posix, what: str) -> None:
    attempt(posix, posix.root, what, posix.name() + b"/below", errno.ENOENT)


@pytest.mark.parametrize("what", ALL)
def test_component_behind_a_dangling_link(posix: Posix, what: str) -> None:
    link = posix.name()
    os.symlink(b"nowhere", link)
    attempt(posix, posix.root, what, link + b"/below", errno.ENOENT)


@pytest.mark.parametrize("what", ON_EXISTING)
def test_last_component_missing(posix: Posix, what: str) -> None:
    attempt(posix, posix.root, what, posix.name(), errno.ENOENT)


@pytest.mark.parametrize("what", ALL)
def test_link_loop_in_the_path(posix: Posix, what: str) -> None:
    one, two = posix.name(), posix.name()
    os.symlink(two, one)
    os.symlink(one, two)
    attempt(posix, posix.root, what, one + b"/below", errno.ELOOP)


@pytest.mark.parametrize("what", ["open", "stat", "chmod", "chown", "truncate", "utimensat", "listdir"])
def test_link_loop_at_the_end(posix: Posix, what: str) -> None:
    one, two = posix.name(), posix.name()
    os.symlink(two, one)
    os.symlink(one, two)
    attempt(posix, posix.root, what, one, errno.ELOOP)


@pytest.mark.parametrize("what", ALL)
def test_name_of_256_bytes(posix: Posix, what: str) -> None:
    attempt(posix, posix.root, what, posix.dir + b"/" + b"x" * 256, errno.ENAMETOOLONG)


@pytest.mark.parametrize("what", ALL)
def test_component_of_256_bytes(posix: Posix, what: str) -> None:
    attempt(posix, posix.root, what, posix.dir + b"/" + b"x" * 256 + b"/below", errno.ENAMETOOLONG)


@pytest.mark.parametrize("what", ON_NEW)
def test_name_of_255_bytes_works(posix: Posix, what: str) -> None:
    path = posix.dir + b"/" + b"x" * 255
    attempt(posix, posix.root, what, path, 0)
    assert os.path.basename(path) in os.listdir(posix.dir)
    os.lstat(path)


@pytest.mark.parametrize("what", ALL)
def test_path_longer_than_path_max(posix: Posix, what: str) -> None:
    attempt(posix, posix.root, what, posix.dir + b"/x" * 2048 + b"/" + b"y" * 255, errno.ENAMETOOLONG)


@pytest.mark.parametrize("what", ALL)
def test_search_permission_denied(posix: Posix, what: str) -> None:
    closed = posix.make("dir", mode=0o644, owner=OWNER[:2])
    if what in ON_EXISTING:
        posix.make("dir" if what in ("rmdir", "listdir") else "symlink" if what == "readlink" else "file", closed + b"/below", owner=OWNER[:2])
    outside = posix.make("dir", mode=0o777)
    call, arguments = ALL[what]
    file = posix.make("file", outside + b"/f", owner=OWNER[:2]) if what in ("link_to", "rename_to") else outside + b"/g"
    posix.expect(errno.EACCES, posix.owner, call, *(closed + b"/below" if a is PATH else file if a is FILE else a for a in arguments))


@pytest.mark.parametrize("mode", [0o555, 0o055, 0o000, 0o455, 0o155])
@pytest.mark.parametrize("what", ON_NEW)
def test_creating_needs_write_permission_on_the_parent(posix: Posix, what: str, mode: int) -> None:
    closed = posix.make("dir", mode=mode, owner=OWNER[:2])
    outside = posix.make("dir", mode=0o777)
    call, arguments = ALL[what]
    file = posix.make("file", outside + b"/f", owner=OWNER[:2]) if what in ("link_to", "rename_to") else None
    posix.expect(errno.EACCES, posix.owner, call, *(closed + b"/below" if a is PATH else file if a is FILE else a for a in arguments))
    assert os.listdir(closed) == []


@pytest.mark.parametrize("what", ["unlink", "rmdir", "rename_from"])
def test_removing_needs_write_permission_on_the_parent(posix: Posix, what: str) -> None:
    closed = posix.make("dir", owner=OWNER[:2], mode=0o755)
    below = posix.make("dir" if what == "rmdir" else "file", closed + b"/below", owner=OWNER[:2])
    os.chmod(closed, 0o555)
    outside = posix.make("dir", mode=0o777)
    call, arguments = ALL[what]
    posix.expect(errno.EACCES, posix.owner, call, *(below if a is PATH else outside + b"/g" if a is FILE else a for a in arguments))
    os.lstat(below)


@pytest.mark.parametrize(
    "bits,identity,allowed",
    [
        (0o700, OWNER, True),
        (0o070, OWNER, False),
        (0o007, OWNER, False),
        (0o070, (65532, OWNER[1], ()), True),
        (0o700, (65532, OWNER[1], ()), False),
        (0o007, (65532, OWNER[1], ()), False),
        (0o070, (65532, 65531, (OWNER[1],)), True),
        (0o007, (65532, 65531, (OWNER[1],)), False),
        (0o700, (65532, 65531, (1, 2, OWNER[1])), False),
        (0o007, (65532, 65531, ()), True),
        (0o770, (65532, 65531, ()), False),
        (0o000, (0, 0, ()), True),
    ],
)
@pytest.mark.parametrize("what", ON_NEW)
def test_class_of_permission_bits_that_decides(posix: Posix, what: str, bits: int, identity: tuple[int, int, tuple[int, ...]], allowed: bool) -> None:
    """Exactly one class counts: the owner's bits for the owner, the group's for a member by primary or supplementary group, the others' for
    the rest."""
    directory = posix.make("dir", mode=bits, owner=OWNER[:2])
    outside = posix.make("dir", mode=0o777)
    call, arguments = ALL[what]
    file = posix.make("file", outside + b"/f", owner=identity[:2]) if what in ("link_to", "rename_to") else None
    expected = 0 if allowed else errno.EACCES
    posix.expect(expected, posix.agent(*identity), call, *(directory + b"/below" if a is PATH else file if a is FILE else a for a in arguments))
