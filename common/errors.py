"""Every error kvfs raises: one tree, with an errno and a wire code per class.

    KvfsError
    ├── FsError              what a file system call answers: one class per errno
    ├── TransportError       the other side could not be asked, or spoke nonsense
    ├── TxnError             a metadata transaction did not commit
    ├── ChainError           a storage target will not do this now: refresh routing, try again
    ├── DataError            stored bytes are not what was written
    ├── ClusterError         the manager refuses
    ├── SetupError           a person must change something: configuration, ports, folders, /dev/fuse
    └── CacheError           a KV-cache space is not what was asked for

Invariants: `code` is unique, never reused and never renumbered (it is on the wire, docs/format.md); every class has an errno; `retryable` says
that the same request may succeed later without anyone changing it. An error that crosses the wire comes back as the same class.
This module must never import anything of ours.
"""

from __future__ import annotations

import errno as _errno
from typing import ClassVar


class KvfsError(Exception):
    """Base of all. `code` is the wire status (0 is success), `errno` what a system call answers."""

    code: ClassVar[int] = 1
    errno: ClassVar[int] = _errno.EIO
    retryable: ClassVar[bool] = False

    @property
    def message(self) -> str:
        """The text for a person: what happened and, where someone can do something, what to do."""
        return str(self.args[0]) if self.args else type(self).__name__


# --- FsError: 100-199 ---------------------------------------------------------------------------------------------------------------


class FsError(KvfsError):
    code = 100


class NotFound(FsError):
    code, errno = 101, _errno.ENOENT


class AlreadyExists(FsError):
    code, errno = 102, _errno.EEXIST


class NotDirectory(FsError):
    code, errno = 103, _errno.ENOTDIR


class IsDirectory(FsError):
    code, errno = 104, _errno.EISDIR


class NotEmpty(FsError):
    code, errno = 105, _errno.ENOTEMPTY


class AccessDenied(FsError):
    """The mode bits refuse (EACCES)."""

    code, errno = 106, _errno.EACCES


class NotPermitted(FsError):
    """Only the owner or root may (EPERM)."""

    code, errno = 107, _errno.EPERM


class InvalidArgument(FsError):
    code, errno = 108, _errno.EINVAL


class NameTooLong(FsError):
    code, errno = 109, _errno.ENAMETOOLONG


class TooManyLinks(FsError):
    code, errno = 110, _errno.EMLINK


class SymlinkLoop(FsError):
    code, errno = 111, _errno.ELOOP


class CrossDevice(FsError):
    code, errno = 112, _errno.EXDEV


class NoSpace(FsError):
    code, errno = 113, _errno.ENOSPC


class QuotaExceeded(FsError):
    code, errno = 114, _errno.EDQUOT


class FileTooBig(FsError):
    code, errno = 115, _errno.EFBIG


class BadHandle(FsError):
    code, errno = 116, _errno.EBADF


class StaleHandle(FsError):
    code, errno = 117, _errno.ESTALE


class NoAttribute(FsError):
    code, errno = 118, _errno.ENODATA


class NotSupported(FsError):
    code, errno = 119, _errno.ENOTSUP


class Busy(FsError):
    code, errno = 120, _errno.EBUSY


class ReadOnly(FsError):
    code, errno = 121, _errno.EROFS


class OutOfRange(FsError):
    code, errno = 122, _errno.ERANGE


class ArgumentTooBig(FsError):
    code, errno = 123, _errno.E2BIG


class NoDevice(FsError):
    code, errno = 124, _errno.ENXIO


class InputOutput(FsError):
    """The device failed: an I/O error that no replica could make good."""

    code, errno = 125, _errno.EIO


# --- TransportError: 200-299 --------------------------------------------------------------------------------------------------------


class TransportError(KvfsError):
    code, errno = 200, _errno.EIO


class ConnectionLost(TransportError):
    """The connection ended before the answer came: the request may have been carried out or not."""

    code, errno, retryable = 201, _errno.ECONNRESET, True


class Unreachable(TransportError):
    """No connection could be made: the request was not carried out."""

    code, errno, retryable = 202, _errno.EHOSTUNREACH, True


class DeadlineExceeded(TransportError):
    code, errno = 203, _errno.ETIMEDOUT


class MalformedFrame(TransportError):
    code, errno = 204, _errno.EPROTO


class UnknownMethod(TransportError):
    code, errno = 205, _errno.ENOSYS


class MessageTooBig(TransportError):
    code, errno = 206, _errno.EMSGSIZE


class VersionMismatch(TransportError):
    """The two sides have no protocol version in common."""

    code, errno = 207, _errno.EPROTONOSUPPORT


class WrongCluster(TransportError):
    """The other side belongs to another cluster."""

    code, errno = 208, _errno.EREMCHG


class Unauthenticated(TransportError):
    code, errno = 209, _errno.EACCES


class Overloaded(TransportError):
    code, errno, retryable = 210, _errno.EAGAIN, True


class BadRequest(TransportError):
    """A well-formed frame whose message is not a valid request (bytes that do not parse, a field out of its limits)."""

    code, errno = 211, _errno.EINVAL


class InternalError(TransportError):
    """A fault in the service; its log has the details."""

    code, errno = 212, _errno.EIO


class ServiceStopping(TransportError):
    code, errno, retryable = 213, _errno.EAGAIN, True


class UnknownRegion(TransportError):
    """A span names memory that was not registered on this connection, or reaches outside it."""

    code, errno = 214, _errno.EFAULT


# --- TxnError: 300-399 --------------------------------------------------------------------------------------------------------------


class TxnError(KvfsError):
    code, errno = 300, _errno.EAGAIN


class TxnConflict(TxnError):
    code, retryable = 301, True


class TxnTooOld(TxnError):
    code, retryable = 302, True


class TxnMaybeCommitted(TxnError):
    code, retryable = 303, True


class TxnTooBig(TxnError):
    code, errno = 304, _errno.E2BIG


class TxnThrottled(TxnError):
    code, retryable = 305, True


# --- ChainError: 400-499 ------------------------------------------------------------------------------------------------------------


class ChainError(KvfsError):
    code, errno, retryable = 400, _errno.EAGAIN, True


class ChainVersionMismatch(ChainError):
    """Sender and target know different versions of the chain."""

    code = 401


class TargetNotServing(ChainError):
    code = 402


class NotChainHead(ChainError):
    code = 403


class UnknownTarget(ChainError):
    code = 404


class UnknownChain(ChainError):
    code = 405


class ForwardFailed(ChainError):
    """The successor could not be written: the chain is about to change."""

    code = 406


class StaleUpdate(ChainError):
    """An update older than what the target has: it was applied, or superseded."""

    code, retryable = 407, False


class MissingUpdate(ChainError):
    """An update that skips a version: the target lacks the one before."""

    code = 408


class ChunkNotFound(ChainError):
    """No such chunk: a hole in a file, a miss in a cache."""

    code, errno, retryable = 409, _errno.ENOENT, False


class TargetOffline(ChainError):
    """The target's disk failed; it takes no part until an operator replaces it."""

    code, errno = 410, _errno.EIO


class NoServingTarget(ChainError):
    """No target of the chain can serve now."""

    code = 411


# --- DataError: 500-599 -------------------------------------------------------------------------------------------------------------


class DataError(KvfsError):
    code, errno = 500, _errno.EIO


class ChecksumMismatch(DataError):
    code, retryable = 501, True


class IndexCorrupt(DataError):
    """The index of a target or a metadata store cannot be read; nothing stored was touched."""

    code = 502
    ADVICE: ClassVar[str] = (
        "Nothing was changed. Restore its directory from a copy; that of a storage target with replicas may also be emptied, they refill it"
    )


class ChunkLost(DataError):
    """A chunk that was, or may have been, among the data of a chain that was given up (`kvfs admin accept-loss`)."""

    code = 503


class UnsyncedLost(DataError):
    """Acknowledged bytes may be gone before they were synced: all replicas of a chain lost their power, or their disks. Write them again."""

    code = 504


# --- ClusterError: 600-699 ----------------------------------------------------------------------------------------------------------


class ClusterError(KvfsError):
    code, errno = 600, _errno.EAGAIN


class NotPrimary(ClusterError):
    """This manager is not the primary; the message names the one that is, where known."""

    code, retryable = 601, True


class NotRegistered(ClusterError):
    code = 602


class LeaseExpired(ClusterError):
    code, retryable = 603, True


class NotEnoughTargets(ClusterError):
    """A chain table asks for more replicas or nodes than there are."""

    code, errno = 604, _errno.EINVAL


class StaleIncarnation(ClusterError):
    """An older run of a node speaks while a newer one is registered: it must exit."""

    code = 605


# --- SetupError: 700-799 ------------------------------------------------------------------------------------------------------------


class SetupError(KvfsError):
    code, errno = 700, _errno.EINVAL


class ConfigError(SetupError):
    code = 701


class AddressInUse(SetupError):
    code, errno = 702, _errno.EADDRINUSE


class MountError(SetupError):
    """The mount point or /dev/fuse is not fit."""

    code, errno = 703, _errno.ENOTDIR


class WrongDataDirectory(SetupError):
    """A data directory of another cluster, another node or another role."""

    code = 704


class FormatTooNew(SetupError):
    """Data written by a newer kvfs: upgrade, nothing was touched."""

    code = 705


class DirectoryInUse(SetupError):
    """Another process has this data directory open."""

    code, errno = 706, _errno.EBUSY


class ClusterNotFound(SetupError):
    """No cluster where the command was told to look."""

    code, errno = 707, _errno.ENOENT


# --- CacheError: 800-899 ------------------------------------------------------------------------------------------------------------


class CacheError(KvfsError):
    code, errno = 800, _errno.EINVAL


class SpaceDiffers(CacheError):
    """The space of that name holds blocks of another format than the one asked for; the message names the field."""

    code = 801


def _all_classes(root: type[KvfsError]) -> list[type[KvfsError]]:
    found = [root]
    for child in root.__subclasses__():
        found.extend(_all_classes(child))
    return found


BY_CODE: dict[int, type[KvfsError]] = {cls.code: cls for cls in _all_classes(KvfsError)}


def from_wire(code: int, message: str) -> KvfsError:
    """The error that a reply with this status stands for; an unknown code (a newer peer) is a plain KvfsError that keeps the number."""
    cls = BY_CODE.get(code)
    return cls(message) if cls is not None else KvfsError(f"error {code} of a newer peer: {message}")


def from_os(error: OSError, what: str) -> KvfsError:
    """The tree's class for an operating-system error; `what` names the file or step for the message."""
    text = f"{what}: {error.strerror or error}"
    if error.errno in (_errno.ENOSPC, _errno.EDQUOT):
        return NoSpace(text)
    return _BY_ERRNO.get(error.errno or 0, InputOutput)(text)


_BY_ERRNO: dict[int, type[FsError]] = {cls.errno: cls for cls in FsError.__subclasses__()}
