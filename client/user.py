"""Who asks: the user of a metadata request.

Owns `User`. A User is a value; it never looks at the process after it was made.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from kvfs.common.wire import meta_pb2 as pb


@dataclass(frozen=True, slots=True)
class User:
    """uid, gid and supplementary groups, as the metadata service checks them."""

    uid: int
    gid: int
    groups: tuple[int, ...] = ()
    wire: pb.User = field(init=False, repr=False, compare=False)
    """The same as a message, made once: a request copies it."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "wire", pb.User(uid=self.uid, gid=self.gid, groups=self.groups))

    @classmethod
    def current(cls) -> User:
        """The effective user of this process."""
        return cls(os.geteuid(), os.getegid(), tuple(os.getgroups()))


ROOT = User(0, 0)
