"""How long attributes that a reply brings may be trusted.

A lease was granted while its request was under way, so it may be over before its reply is heard: the time may have passed (a change waits for other
clients), or another client's change may have ended it, whose notice came on a way of its own. Invariants: a lease counts from when it was asked for;
a reply to what was asked before a revocation of its inode was heard brings none; what is remembered is bounded (what falls out costs leases only).
"""

from __future__ import annotations

from collections import OrderedDict

from kvfs.common.boundary.clock import Clock
from kvfs.common.wire import meta_pb2 as pb

REMEMBERED_MAX = 4096

Asked = tuple[int, float]
"""When a request was made: revocations heard by then, and the time."""


class Leases:
    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._heard = 0
        self._floor = 0
        """Of the newest revocation that is no longer remembered by inode."""
        self._revoked: OrderedDict[int, int] = OrderedDict()

    def asked(self) -> Asked:
        """Take this before a request."""
        return self._heard, self._clock.monotonic()

    def revoked(self, inode: int) -> None:
        self._heard += 1
        self._revoked[inode] = self._heard
        self._revoked.move_to_end(inode)
        if len(self._revoked) > REMEMBERED_MAX:
            self._floor = self._revoked.popitem(last=False)[1]

    def lose_all(self) -> None:
        """The metadata service was restarted: what was asked before brings no lease."""
        self._heard += 1
        self._floor = self._heard
        self._revoked.clear()

    def heard(self, inode: pb.Inode, asked: Asked) -> pb.Inode:
        """The attributes of a reply, with what is left of their lease."""
        lease_ms = inode.attr_lease_ms
        if lease_ms:
            if asked[0] != self._heard and self._revoked.get(inode.inode, self._floor) > asked[0]:
                inode.attr_lease_ms = 0
            else:
                spent_ms = int((self._clock.monotonic() - asked[1]) * 1000) + 1
                inode.attr_lease_ms = max(0, lease_ms - spent_ms)
        return inode
