"""Open files that only this process knows: readers, and sessions that are closed but still stored.

A reading session is stored only when it has been open for a while (or when the file loses its last name), so that opening and closing a file to read
costs no commit. A writing session whose close has nothing to report is cleared in the background. Invariants: at any moment a session is open
(stored or here), or closing (stored, to be cleared), or forgotten; the tables are bounded by OPEN_MAX.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from kvfs.common.errors import InvalidArgument, Overloaded
from kvfs.meta.namespace.step import Reader

OPEN_MAX = 1_000_000
SESSION_BYTES = 16
STORE_AFTER_NS = 1_000_000_000


def check_session(session: bytes) -> None:
    """Before anything is kept of it: one that cannot be stored would be in the way of all that are to be stored or cleared with it."""
    if len(session) != SESSION_BYTES:
        raise InvalidArgument(f"a session has a name of {SESSION_BYTES} bytes, not {len(session)}")


class OpenFiles:
    def __init__(self) -> None:
        self._readers: dict[int, dict[bytes, Reader]] = {}
        self._young: dict[bytes, int] = {}
        """Readers that are not stored yet, by session, oldest first: the inode."""
        self._closing: dict[int, set[bytes]] = {}
        self._count = 0

    def open_reader(self, inode: int, session: bytes, client_id: bytes, now_ns: int, *, nameless: bool = False) -> None:
        """`nameless`: the file has no name any more. Then the end of the session is looked at in the background, for it may be the last."""
        if self._count >= OPEN_MAX:
            raise Overloaded(f"{OPEN_MAX} files are open for reading")
        check_session(session)
        by_session = self._readers.setdefault(inode, {})
        if session not in by_session:
            self._count += 1
            self._young[session] = inode
        by_session[session] = Reader(session, client_id, now_ns, nameless)

    def close(self, inode: int, session: bytes) -> None:
        """A session ends: nothing is stored of it, or it will be cleared in the background."""
        check_session(session)
        by_session = self._readers.get(inode)
        reader = by_session.pop(session, None) if by_session is not None else None
        if reader is not None:
            self._count -= 1
            if not by_session:
                del self._readers[inode]
            if self._young.pop(session, None) is not None and not reader.nameless:
                return
        self._closing.setdefault(inode, set()).add(session)

    def forget(self, inode: int, session: bytes) -> None:
        """A session ended, its record with it."""
        by_session = self._readers.get(inode)
        if by_session is not None and by_session.pop(session, None) is not None:
            self._count -= 1
            self._young.pop(session, None)
            if not by_session:
                del self._readers[inode]

    def readers(self, inode: int) -> Sequence[Reader]:
        by_session = self._readers.get(inode)
        return () if not by_session else tuple(by_session.values())

    def closing(self, inode: int) -> Collection[bytes]:
        return self._closing.get(inode, ())

    def keep(self, inode: int) -> Sequence[Reader]:
        """All readers of the inode, for a transaction that stores them. Should it fail, their closes clear records that are not there: no harm."""
        for session in self._readers.get(inode, ()):
            self._young.pop(session, None)
        return self.readers(inode)

    def due_to_store(self, now_ns: int, limit: int) -> list[tuple[int, Reader]]:
        """Readers that have been open long enough to be worth a record."""
        due: list[tuple[int, Reader]] = []
        for session, inode in self._young.items():
            reader = self._readers[inode][session]
            if 0 <= now_ns - reader.opened_ns < STORE_AFTER_NS or len(due) >= limit:  # opened later than now: the clock was set back
                break
            due.append((inode, reader))
        return due

    def mark_stored(self, session: bytes) -> None:
        self._young.pop(session, None)

    def take_closing(self, limit: int) -> list[tuple[int, bytes]]:
        """Sessions to clear; each stays `closing` until `cleared`."""
        taken: list[tuple[int, bytes]] = []
        for inode, sessions in self._closing.items():
            taken.extend((inode, session) for session in sessions)
            if len(taken) >= limit:
                break
        return taken

    def cleared(self, inode: int, session: bytes) -> None:
        sessions = self._closing.get(inode)
        if sessions is not None:
            sessions.discard(session)
            if not sessions:
                del self._closing[inode]

    def clients(self) -> set[bytes]:
        """Who has a file open for reading here."""
        return {reader.client_id for by_session in self._readers.values() for reader in by_session.values()}

    def forget_client(self, client_id: bytes) -> None:
        """Close every reader of a client that is gone; stored ones are cleared in the background."""
        for inode, by_session in list(self._readers.items()):
            for reader in list(by_session.values()):
                if reader.client_id == client_id:
                    self.close(inode, reader.session)

    def count(self) -> int:
        return self._count
