"""link(2): link counts, times, which things can be linked, and each errno."""

from __future__ import annotations

import errno
import os

import pytest
from tests.mount.posix.conftest import OTHER, OWNER, Posix

LINKABLE = ["file", "fifo", "socket", "char", "block", "symlink"]


@pytest.mark.parametrize("kind", LINKABLE)
def test_second_and_third_name(posix: Posix, kind: str) -> None:
    one, two, three = posix.make(kind), posix.name(), posix.name()
    with posix.touches(one, times="c"), posix.touches(posix.dir):
        posix.root.link(one, two)
    posix.root.link(two, three)
    first, second, third = os.lstat(one), os.lstat(two), os.lstat(three)
    assert first == second == third and first.st_nlink == 3
    posix.root.unlink(one)
    assert os.lstat(two).st_nlink == os.lstat(three).st_nlink == 2
    posix.root.unlink(two)
    posix.root.unlink(three)


def test_names_share_content_and_attributes(posix: Posix) -> None:
    one, two = posix.make("file", data=b"before"), posix.name()
    os.link(one, two)
    posix.root.chmod(two, 0o600)
    posix.root.write_file(two, b"AFTER!")
    assert posix.root.read_file(one) == b"AFTER!"
    assert posix.root.stat(one) == posix.root.stat(two)


def test_content_written_through_one_name_is_read_through_the_other_while_open(posix: Posix) -> None:
    one, two = posix.make("file"), posix.name()
    os.link(one, two)
    writer, reader = posix.root.open(one, os.O_WRONLY), posix.root.open(two, os.O_RDONLY)
    posix.root.write(writer, b"shared")
    assert posix.root.pread(reader, 10, 0) == b"shared"
    posix.root.close(writer)
    posix.root.close(reader)


def test_link_across_directories(posix: Posix) -> None:
    a, b = posix.make("dir"), posix.make("dir")
    file = posix.make("file", a + b"/f", data=b"x")
    with posix.touches(b), posix.touches(a, unchanged=True):
        posix.root.link(file, b + b"/g")
    assert posix.root.read_file(b + b"/g") == b"x"


@pytest.mark.parametrize("kind", [*LINKABLE, "dir"])
def test_new_name_exists(posix: Posix, kind: str) -> None:
    file, there = posix.make("file"), posix.make(kind)
    with posix.touches(file, posix.dir, unchanged=True):
        posix.expect(errno.EEXIST, posix.root, "link", file, there)
    assert os.lstat(file).st_nlink == 1


def test_link_of_a_directory(posix: Posix) -> None:
    directory = posix.make("dir", owner=OWNER[:2])
    posix.expect(errno.EPERM, posix.root, "link", directory, posix.name())


def test_link_to_itself(posix: Posix) -> None:
    file = posix.make("file")
    posix.expect(errno.EEXIST, posix.root, "link", file, file)


def test_linked_symlink_is_the_symlink(posix: Posix) -> None:
    link, second = posix.make("symlink"), posix.name()
    posix.root.link(link, second)
    assert os.readlink(second) == b"target" and os.lstat(second).st_ino == os.lstat(link).st_ino


def test_link_of_a_removed_file(posix: Posix) -> None:
    file = posix.make("file")
    os.unlink(file)
    posix.expect(errno.ENOENT, posix.root, "link", file, posix.name())


def test_link_needs_write_permission_on_the_new_parent(posix: Posix) -> None:
    a, b = posix.make("dir", owner=OWNER[:2]), posix.make("dir", owner=OTHER[:2], mode=0o755)
    file = posix.make("file", a + b"/f", owner=OWNER[:2])
    posix.expect(errno.EACCES, posix.owner, "link", file, b + b"/g")
    assert os.lstat(file).st_nlink == 1


def test_name_of_255_bytes(posix: Posix) -> None:
    file = posix.make("file")
    posix.root.link(file, posix.dir + b"/" + b"l" * 255)
    assert os.lstat(file).st_nlink == 2


def test_many_links(posix: Posix) -> None:
    file = posix.make("file")
    for number in range(300):
        os.link(file, posix.dir + b"/link%d" % number)
    assert os.lstat(file).st_nlink == 301
