"""A chain as one of its targets sees it: who is before, who is after, who may be written.

Owns: the reading of a chain's target list. Invariants: a view is a value and belongs to one chain version; the serving targets come first, in chain
order, then at most the one that is syncing; what waits or is down takes no part. Never looks at nodes, addresses or clocks.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

from kvfs.common.ids import chunk_inode, is_block


class PublicState(enum.IntEnum):
    """What everybody knows about a target; the numbers of common/wire/cluster.proto."""

    INVALID = 0
    SERVING = 1
    SYNCING = 2
    WAITING = 3
    LASTSRV = 4
    OFFLINE = 5


class LocalState(enum.IntEnum):
    """What a target says of itself in heartbeats; the numbers of common/wire/cluster.proto."""

    INVALID = 0
    UPTODATE = 1
    ONLINE = 2
    OFFLINE = 3


@dataclass(frozen=True, slots=True)
class Successor:
    """Whom updates are forwarded to."""

    target_id: int
    syncing: bool


@dataclass(frozen=True, slots=True)
class ChainView:
    chain_id: int
    version: int
    targets: tuple[tuple[int, PublicState], ...]
    """(target id, state), head first."""
    lost_below: int = 0
    """The chain's data was given up: chunks of files with a smaller inode number that are not there are lost."""

    @classmethod
    def of(cls, chain_id: int, version: int, targets: Sequence[tuple[int, int]], lost_below: int = 0) -> ChainView:
        return cls(chain_id, version, tuple((target, PublicState(state)) for target, state in targets), lost_below)

    def lost(self, chunk_id: bytes) -> bool:
        """Whether a chunk that is not there may have been lost. A KV-cache block that is not there is a miss, whatever became of it."""
        return not is_block(chunk_id) and chunk_inode(chunk_id) < self.lost_below

    def state_of(self, target_id: int) -> PublicState:
        return dict(self.targets).get(target_id, PublicState.INVALID)

    @property
    def serving(self) -> tuple[int, ...]:
        return tuple(target for target, state in self.targets if state is PublicState.SERVING)

    @property
    def writable(self) -> tuple[int, ...]:
        """The path of an update: the serving targets, then those that are syncing."""
        return self.serving + tuple(target for target, state in self.targets if state is PublicState.SYNCING)

    def successor_of(self, target_id: int) -> Successor | None:
        path = self.writable
        if target_id not in path:
            return None
        place = path.index(target_id) + 1
        if place == len(path):
            return None
        return Successor(path[place], self.state_of(path[place]) is PublicState.SYNCING)

    def predecessor_of(self, target_id: int) -> int:
        """0: none, the target is the head or takes no part."""
        path = self.writable
        place = path.index(target_id) if target_id in path else 0
        return path[place - 1] if place else 0
