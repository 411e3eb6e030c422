"""The connection to the kernel: /dev/fuse opened and mounted, the handshake, notifications, and the end.

Owns the descriptor. Invariants: what is mounted by `start` is a mount of type fuse.kvfs or nothing; the descriptor is closed once, after everything
that uses it has ended (closing it aborts what the kernel still waits for); notifications may be sent from any thread.
It must never serve a request but INIT: that is the loop's.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import socket
import subprocess

import trio

from kvfs.common.errors import MountError
from kvfs.fuse import kernel, protocol
from kvfs.fuse.protocol import Init

log = logging.getLogger("kvfs.fuse")

READ_BUFFER_BYTES = protocol.REQUEST_BYTES_MAX + protocol.PAGE_BYTES
"""The largest request: a WRITE of REQUEST_BYTES_MAX behind its header."""
MS_RDONLY = 1
FUSERMOUNT_TIMEOUT_S = 30.0

WANTED = (
    Init.ASYNC_READ
    | Init.ATOMIC_O_TRUNC  # open truncates by itself: one step at the service
    | Init.EXPORT_SUPPORT
    | Init.BIG_WRITES
    | Init.AUTO_INVAL_DATA  # pages read under a lease that ran out unheard go when the times or the length have changed
    | Init.DO_READDIRPLUS
    | Init.READDIRPLUS_AUTO
    | Init.ASYNC_DIO
    | Init.PARALLEL_DIROPS
    | Init.MAX_PAGES
    | Init.CACHE_SYMLINKS  # an inode's target never changes
    | Init.INIT_EXT
    | Init.HAS_EXPIRE_ONLY
)
"""Not wanted, each for a reason: WRITEBACK_CACHE (another mount must see what close(2) left), NO_OPENDIR (a listing has a cursor), POSIX_LOCKS and
FLOCK_LOCKS (locks are local to a mount), POSIX_ACL (permissions are the metadata service's)."""


class Session:
    def __init__(self, fd: int, mount_point: str) -> None:
        self.fd = fd
        self.mount_point = mount_point
        self.minor = 0
        self.flags = Init(0)
        self._closed = False

    def takes_names_back(self) -> bool:
        """Can the kernel be made to ask for a name again, and for all names at once? The latter is tried, not only read off the version: much
        hangs on it."""
        if self.minor < protocol.INC_EPOCH_MINOR or not self.flags & Init.HAS_EXPIRE_ONLY:
            return False
        try:
            self.notify(protocol.inc_epoch())
        except OSError as error:
            log.warning("the kernel takes no notice of an epoch (%s): it keeps no names", error.strerror)
            return False
        return True

    def notify(self, message: bytes) -> None:
        """Raises OSError: ENOENT when the kernel does not know what it is told of. May block for as long as the kernel needs a lock."""
        os.write(self.fd, message)

    async def shake_hands(self, max_background: int) -> None:
        """Answer INIT, the kernel's first request. Raises MountError when the kernel is too old."""
        buffer = bytearray(READ_BUFFER_BYTES)
        while True:
            try:
                os.readv(self.fd, [buffer])
                break
            except BlockingIOError:
                await trio.lowlevel.wait_readable(self.fd)
            except OSError as error:
                if error.errno == errno.ENODEV:
                    raise MountError(f"{self.mount_point} was unmounted before it was up") from None
                if error.errno not in (errno.EINTR, errno.ENOENT):
                    raise
        answer, self.minor, self.flags = negotiate(buffer, max_background)
        os.write(self.fd, answer)
        if self.minor < protocol.VERSION_MINOR_OLDEST:
            raise MountError(f"this kernel speaks version 7.{self.minor} of FUSE: kvfs needs 7.{protocol.VERSION_MINOR_OLDEST} (Linux 5.4) or newer")

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            os.close(self.fd)


def negotiate(request: bytes | bytearray, max_background: int) -> tuple[bytes, int, Init]:
    """The answer to INIT, the minor version spoken and what was agreed."""
    _, op, unique, *_ = protocol.IN_HEADER.unpack_from(request)
    if op != protocol.Op.INIT:
        raise MountError(f"the kernel began with request {op} instead of INIT: this is not a FUSE connection")
    at = protocol.HEADER_BYTES
    major, minor, max_readahead, low = protocol.INIT_IN.unpack_from(request, at)
    if major != protocol.VERSION_MAJOR:
        raise MountError(f"this kernel speaks version {major}.{minor} of FUSE: kvfs knows version 7")
    offered = Init(low)
    if offered & Init.INIT_EXT:
        offered |= Init(protocol.INIT_FLAGS2_IN.unpack_from(request, at + protocol.INIT_IN.size)[0] << 32)
    agreed = WANTED & offered
    minor = min(minor, protocol.VERSION_MINOR)
    body = protocol.INIT_OUT.pack(
        protocol.VERSION_MAJOR,
        protocol.VERSION_MINOR,
        max_readahead,
        agreed & 0xFFFFFFFF,
        max_background,
        max(1, max_background * 3 // 4),
        protocol.REQUEST_BYTES_MAX,
        1,
        protocol.REQUEST_PAGES_MAX,
        0,
        agreed >> 32,
        0,
        0,
    )
    return protocol.reply(unique, body), minor, agreed


def start(mount_point: str, *, source: str, allow_other: bool, read_only: bool) -> Session:
    """Open /dev/fuse and mount it. Blocks for a moment. Raises MountError with what to do."""
    if os.geteuid() == 0:
        return Session(_mount(mount_point, source, allow_other, read_only), mount_point)
    return Session(_fusermount(mount_point, source, allow_other, read_only), mount_point)


def _mount(mount_point: str, source: str, allow_other: bool, read_only: bool) -> int:
    """mount(2), with setuid programs and devices, as root may."""
    fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    if not kernel.allow_pages(protocol.REQUEST_PAGES_MAX):
        log.info("fs.fuse.max_pages_limit stays as it is: writes of 1 MiB from unaligned memory come in two pieces")
    options = [f"fd={fd}", "rootmode=40000", "user_id=0", "group_id=0", *_options(allow_other)]
    libc = ctypes.CDLL(None, use_errno=True)
    texts = (os.fsencode(text) for text in (source, mount_point, kernel.FILE_SYSTEM_TYPE))
    if libc.mount(*texts, ctypes.c_ulong(MS_RDONLY if read_only else 0), ",".join(options).encode()) == 0:
        return fd
    number = ctypes.get_errno()
    os.close(fd)
    raise MountError(
        f"mounting on {mount_point} failed ({os.strerror(number)}): mounting needs the right to (CAP_SYS_ADMIN; in a container --cap-add SYS_ADMIN)"
    )


def _options(allow_other: bool) -> list[str]:
    return ["default_permissions", f"max_read={protocol.REQUEST_BYTES_MAX}", *(["allow_other"] if allow_other else [])]


def _fusermount(mount_point: str, source: str, allow_other: bool, read_only: bool) -> int:
    """The setuid helper mounts for everybody else, and sends the descriptor back over a socket."""
    options = [f"fsname={source}", f"subtype={kernel.SUBTYPE}", *_options(allow_other), *(["ro"] if read_only else [])]
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        try:
            done = subprocess.run(
                ["fusermount3", "-o", ",".join(options), "--", mount_point], env={**os.environ, "_FUSE_COMMFD": str(theirs.fileno())},
                pass_fds=(theirs.fileno(),), capture_output=True, text=True, timeout=FUSERMOUNT_TIMEOUT_S, check=False,
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired) as error:
            raise MountError(f"fusermount3 does not work ({error}): install the package fuse3, or mount as root") from None
        theirs.close()
        ours.settimeout(FUSERMOUNT_TIMEOUT_S)
        fds = socket.recv_fds(ours, 1, 1)[1] if done.returncode == 0 else []
    if not fds:
        raise MountError(
            f"mounting on {mount_point} failed ({done.stderr.strip() or 'fusermount3 sent no descriptor'}): run as root, or, with allow_other, "
            "check that user_allow_other is set in /etc/fuse.conf"
        )
    os.set_blocking(fds[0], False)
    os.set_inheritable(fds[0], False)
    return fds[0]
