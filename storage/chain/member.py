"""A target's place in its chain: what it thinks of itself, what the routing says of it, and who stands before and after it.

The part of the replica's state machine that knows no chunk; `replica.py` has the rest. Invariants:
- `view.version` never goes back;
- a target that was away, or found itself different, takes part again only after the routing has shown that the cluster knows it was away.
Must never: serve what the routing does not say it serves.
"""

from __future__ import annotations

import enum

from kvfs.common import errors
from kvfs.storage.chain.messages import DropLeftovers, Exit, Report, ResolveLeftovers, Result, StartResync, StopResync, TargetEffect, refusal
from kvfs.storage.chain.view import ChainView, LocalState, PublicState, Successor


class Phase(enum.Enum):
    """What the target thinks of itself."""

    RETURNING = "returning"
    """Started with data of an earlier run: takes no part until the routing shows that the cluster knows it was away."""
    ONLINE = "online"
    """Alive, not up to date."""
    UPTODATE = "uptodate"
    EJECTED = "ejected"
    """Found itself different from its successor: out, until the routing shows it."""
    FAILED = "failed"
    """The disk failed: out for good."""
    RETIRED = "retired"
    """Its place in the chain is another's: out, until it is asked back."""


_AWAY = frozenset((PublicState.OFFLINE, PublicState.WAITING, PublicState.LASTSRV))


class Member:
    def __init__(self, target_id: int, *, fresh: bool) -> None:
        """`fresh`: made for a chain that has never held anything, so it lacks nothing."""
        self.target_id = target_id
        self.phase = Phase.UPTODATE if fresh else Phase.RETURNING
        self.problem = ""
        self.view: ChainView | None = None
        self.public = PublicState.INVALID
        self.successor: Successor | None = None
        self.predecessor = 0
        self._resyncing = False

    @property
    def version(self) -> int:
        return self.view.version if self.view is not None else 0

    @property
    def local_state(self) -> LocalState:
        if self.phase is Phase.UPTODATE:
            return LocalState.UPTODATE
        return LocalState.ONLINE if self.phase is Phase.ONLINE else LocalState.OFFLINE

    @property
    def serving(self) -> bool:
        return self.public is PublicState.SERVING and self.phase is Phase.UPTODATE

    @property
    def syncing(self) -> bool:
        return self.public is PublicState.SYNCING and self.phase in (Phase.ONLINE, Phase.UPTODATE)

    @property
    def takes_part(self) -> bool:
        return self.serving or self.syncing

    def on_chain(self, view: ChainView) -> list[TargetEffect]:
        """The routing shows this chain."""
        if self.view is not None and view.version <= self.view.version:
            return []
        self.view = view
        self.public = view.state_of(self.target_id)
        self.successor = view.successor_of(self.target_id)
        self.predecessor = view.predecessor_of(self.target_id)
        effects = self._on_public_state()
        if self.serving and self.successor is not None and self.successor.syncing:
            self._resyncing = True
            effects.append(StartResync(self.successor.target_id, view.version))
        elif self._resyncing:
            self._resyncing = False
            effects.append(StopResync())
        if self.serving and (self.successor is None or self.predecessor == 0):
            # A tail's pending versions are all that is left of their updates: it commits them. A head carries them down the chain. Between the
            # two, the head's recovery passes through.
            effects.append(ResolveLeftovers())
        return effects

    def _on_public_state(self) -> list[TargetEffect]:
        if self.phase in (Phase.RETURNING, Phase.EJECTED) and self.public in _AWAY:
            self.phase = Phase.ONLINE
            return [Report()]
        if self.phase is Phase.ONLINE and self.public is PublicState.SERVING:
            # It was the last one serving: whatever it has is what the chain has.
            self.phase = Phase.UPTODATE
            return [Report()]
        if self.phase is Phase.UPTODATE:
            if self.public in (PublicState.OFFLINE, PublicState.LASTSRV):
                listed = f"the cluster has it {self.public.name.lower()} at chain version {self.version}"
                return [Exit(f"target {self.target_id} thinks it serves, {listed}")]
            if self.public in (PublicState.WAITING, PublicState.SYNCING):
                # The chain changed before anyone took notice of "up to date": whoever is before us now starts again.
                self.phase = Phase.ONLINE
                return [Report()]
        return []

    def fail(self, problem: str) -> list[TargetEffect]:
        """The disk failed."""
        self.phase, self.problem = Phase.FAILED, problem
        return [Report()]

    def retire(self) -> list[TargetEffect]:
        """Asked to leave the chain, since another target is to take its place."""
        if self.phase in (Phase.FAILED, Phase.RETIRED):
            return []
        self.phase = Phase.RETIRED
        return [Report()]

    def return_to_work(self) -> list[TargetEffect]:
        """Asked back: it may have missed updates, so it returns as one that was away."""
        if self.phase is not Phase.RETIRED:
            return []
        self.phase = Phase.RETURNING
        return [*self._on_public_state(), Report()]

    def eject(self, problem: str) -> list[TargetEffect]:
        if self.phase in (Phase.FAILED, Phase.RETIRED):
            return []
        self.phase, self.problem = Phase.EJECTED, problem
        return [Report()]

    def sync_start(self, chain_version: int, from_target: int) -> tuple[Result, list[TargetEffect]]:
        """The predecessor begins to bring this target up to date."""
        refused = self.screen_sync(chain_version, from_target)
        if refused is not None:
            return refused, []
        self.phase = Phase.ONLINE
        return Result(chain_version=self.version), [DropLeftovers()]

    def sync_done(self, chain_version: int, from_target: int) -> tuple[Result, list[TargetEffect]]:
        refused = self.screen_sync(chain_version, from_target)
        if refused is not None:
            return refused, []
        self.phase, self.problem = Phase.UPTODATE, ""
        return Result(chain_version=self.version), [Report()]

    def screen_sync(self, chain_version: int, from_target: int) -> Result | None:
        """Why a message of a resync is not taken; None: it is. What comes with it is taken only then."""
        if chain_version != self.version:
            return refusal(errors.ChainVersionMismatch, self.version)
        if not self.syncing or from_target != self.predecessor:
            return refusal(errors.TargetNotServing, self.version, f"target {self.target_id} is {self.public.name.lower()}, {self.phase.value}")
        return None
