"""File descriptors of a mount, registered: each with a native handle on the same inode.

Owns the table of registered descriptors. Invariants: a descriptor is registered once until it is deregistered (EINVAL); deregistering is idempotent,
and ends when what rings wrote is told to the metadata service. The kernel checked the rights when the descriptor was opened; the native handle has
the same access mode, and the metadata service checks the effective user again.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import threading
from dataclasses import dataclass

from hf3fs_fuse.clusters import client_of, mount_of_device
from kvfs.client import RawFile, User

log = logging.getLogger("kvfs.hf3fs_fuse")

_lock = threading.Lock()
os.register_at_fork(after_in_child=lambda: _renew_lock())


@dataclass(slots=True, eq=False)
class Registered:
    device: int
    inode: int
    access: int
    source: str = ""
    file: RawFile | None = None
    """None while it is being opened."""


_registered: dict[int, Registered] = {}


def open_native(fd: int, entry: Registered) -> RawFile:
    """A native handle on what a descriptor names."""
    mount = mount_of_device(entry.device)
    if mount is None:
        raise OSError(errno.EBADF, f"file descriptor {fd} is not of a file on a kvfs mount")
    entry.source = mount.source
    return client_of(mount).open_inode(entry.inode, entry.access, user=User.current(), name=f"file descriptor {fd}")


def describe(fd: int) -> Registered:
    status = os.fstat(fd)
    return Registered(status.st_dev, status.st_ino, fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE)


def register(fd: int) -> None:
    entry = describe(fd)
    with _lock:
        known = _registered.get(fd)
        if known is not None and (known.device, known.inode) == (entry.device, entry.inode):
            raise OSError(errno.EINVAL, f"file descriptor {fd} is registered already")
        _registered[fd] = entry
    try:
        entry.file = open_native(fd, entry)
    except BaseException:
        with _lock:
            if _registered.get(fd) is entry:
                del _registered[fd]
        raise
    finally:
        if known is not None and known.file is not None:
            log.warning("file descriptor %d was closed without deregister_fd, and names another file now", fd)
            _close_stale(known.file)


def deregister(fd: int) -> None:
    with _lock:
        entry = _registered.pop(fd, None)
    if entry is not None and entry.file is not None:
        entry.file.close()


def find(fd: int) -> Registered:
    entry = _registered.get(fd)
    if entry is None or entry.file is None:
        raise OSError(errno.EBADF, f"file descriptor {fd} is not registered")
    return entry


def registered(fd: int) -> RawFile | None:
    entry = _registered.get(fd)
    return None if entry is None else entry.file


def _renew_lock() -> None:
    """It may have been held by a thread that a forked child does not have. The handles themselves know of forks."""
    global _lock
    _lock = threading.Lock()


def _close_stale(file: RawFile) -> None:
    try:
        file.close()
    except OSError as error:
        log.error("what was written to %s may not be seen: %s", file.name, error)
