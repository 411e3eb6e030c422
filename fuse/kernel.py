"""What mounting needs from the machine: /dev/fuse, mount points, the kernel's tunables, umount(2).

Invariants: every check raises a MountError that says what to do; nothing here looks INTO a mount of ours with stat(2) (from the thread that serves
the mount that would wait for itself): what is mounted is read from /proc/self/mountinfo.
It must never unmount something that is not a kvfs mount.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from kvfs.common.errors import MountError

SUBTYPE = "kvfs"
FILE_SYSTEM_TYPE = f"fuse.{SUBTYPE}"
MNT_DETACH = 2

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class MountEntry:
    device_minor: int
    mount_point: str
    type: str
    source: str


def mounts() -> list[MountEntry]:
    """Everything mounted in this mount namespace, oldest first."""
    found = []
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        left, _, right = line.partition(" - ")
        fields, tail = left.split(" "), right.split(" ")
        found.append(MountEntry(int(fields[2].partition(":")[2]), _unescape(fields[4]), tail[0], _unescape(tail[1])))
    return found


def mount_entry(mount_point: str) -> MountEntry | None:
    """The newest mount on exactly this path."""
    return next((entry for entry in reversed(mounts()) if entry.mount_point == mount_point), None)


def _unescape(text: str) -> str:
    """proc(5): white space, backslash and # are written as a backslash and three octal digits."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match.group(1), 8)), text)


def may_allow_other(configuration: Path = Path("/etc/fuse.conf")) -> bool:
    """Whether fusermount3 lets this user share a mount with others."""
    if os.geteuid() == 0:
        return True
    try:
        lines = configuration.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    return any(line.strip() == "user_allow_other" for line in lines)


def check_device() -> None:
    try:
        fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        raise MountError(
            "there is no /dev/fuse: load the kernel module (modprobe fuse), or, in a container, start it with --device /dev/fuse --cap-add SYS_ADMIN"
        ) from None
    except PermissionError:
        raise MountError("/dev/fuse may not be opened: run as root, or make it accessible (chmod 666 /dev/fuse)") from None
    except OSError as error:
        raise MountError(f"/dev/fuse cannot be opened ({error.strerror}): is the fuse module loaded (modprobe fuse)?") from None
    os.close(fd)
    if os.geteuid() != 0 and shutil.which("fusermount3") is None:
        raise MountError("fusermount3 is missing: install the package fuse3, or mount as root")


def check_mount_point(path: str) -> str:
    """The real, absolute path, when it can be mounted on: an existing, empty directory that is not a mount point."""
    if not path:
        raise MountError("no mount point given: name an empty directory")
    real = os.path.realpath(path)
    entry = mount_entry(real)
    if entry is not None and entry.type.startswith("fuse"):
        what = f"{entry.type} {entry.source}"
        try:
            os.stat(real)
        except OSError as error:
            if error.errno == errno.ENOTCONN:
                raise MountError(
                    f"{real} is a dead mount ({what}): its process is gone; run `kvfs umount {real}` (or umount -l), then mount again"
                ) from None
        raise MountError(f"{real} is mounted already ({what}): run `kvfs umount {real}` first, or choose another directory")
    try:
        names = os.listdir(real)
    except FileNotFoundError:
        raise MountError(f"the mount point {path} does not exist: create it with mkdir -p {path}") from None
    except NotADirectoryError:
        raise MountError(f"the mount point {path} is not a directory: choose an empty directory") from None
    except OSError as error:
        raise MountError(f"the mount point {path} cannot be read ({error.strerror}): check its permissions") from None
    if entry is not None:
        raise MountError(f"{real} is a mount point already ({entry.type}): unmount it first, or choose another directory")
    if names:
        raise MountError(
            f"the mount point {path} is not empty ({len(names)} entries, such as {names[0]!r}): mounting would hide them; choose an empty directory"
        )
    return real


def set_read_ahead(device_minor: int, kilobytes: int) -> bool:
    """Root only; True when the kernel took it."""
    try:
        Path(f"/sys/class/bdi/0:{device_minor}/read_ahead_kb").write_text(f"{kilobytes}\n", encoding="ascii")
    except OSError:
        return False
    return True


def allow_pages(pages: int) -> bool:
    """Root only: one request may have that many pages, in every FUSE mount of this machine from now on. True when it may (the kernel's own limit
    is 256)."""
    limit = Path("/proc/sys/fs/fuse/max_pages_limit")
    try:
        if int(limit.read_text(encoding="ascii")) < pages:
            limit.write_text(f"{pages}\n", encoding="ascii")
    except (OSError, ValueError):
        return False
    return True


def unmount(mount_point: str, *, lazy: bool = False) -> None:
    """umount(2), or fusermount3 when not root. MountError: busy, or not a kvfs mount. May block: the mount's own thread must not call it."""
    entry = mount_entry(mount_point)
    if entry is None:
        raise MountError(f"{mount_point} is not mounted")
    if entry.type != FILE_SYSTEM_TYPE:
        raise MountError(f"{mount_point} is not a kvfs mount but {entry.type}: use umount")
    if os.geteuid() == 0:
        if _libc.umount2(os.fsencode(mount_point), MNT_DETACH if lazy else 0) == 0:
            return
        number = ctypes.get_errno()
        reason = os.strerror(number)
    else:
        command = ["fusermount3", "-u", *(["-z"] if lazy else []), "--", mount_point]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        if done.returncode == 0:
            return
        number, reason = errno.EBUSY, done.stderr.strip()
    if number == errno.EBUSY:
        raise MountError(
            f"{mount_point} is in use: close the files and leave the directories below it (lsof {mount_point} shows them), or unmount lazily"
        )
    raise MountError(f"{mount_point} cannot be unmounted: {reason}")
