"""Pure core: the public states of a chain's targets (craq.md, "States of a target").

A function from (chain, local states) to the next chain; no I/O, no clock, no memory. Invariants of every chain it makes from a sound one:
  - targets stand in the order serving, syncing, waiting, lastsrv, offline: what is alive is fed from the head, what goes offline moves to the end;
  - a chain always has a serving target or, failing that, exactly one lastsrv target: some replica with all acknowledged data is known;
  - at most one target is syncing, and the one before it serves and feeds it;
  - those that serve before and after keep their order: a head holds as pending what the targets behind it may have committed, so nobody is ever put
    before another that serves;
  - any change raises the chain's version by one; no change leaves the chain as it is;
  - while `loss` stays the same, those that serve have whatever was acknowledged, on disk or in the page cache: they have served since, or were filled
    by one that has, or the last one serving is back and its machine has not lost power.
It must never revive a chain through any target but its last serving one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum


class Public(IntEnum):
    """Kept with the chain, known to all. Numbers are those of cluster.proto."""

    SERVING = 1
    SYNCING = 2
    WAITING = 3
    LASTSRV = 4
    OFFLINE = 5


class Local(IntEnum):
    """What a target's node says of it (or its silence says). UNKNOWN: nothing yet, so nothing changes because of it."""

    UNKNOWN = 0
    UPTODATE = 1
    ONLINE = 2
    OFFLINE = 3


@dataclass(frozen=True, slots=True)
class Member:
    target_id: int
    state: Public


@dataclass(frozen=True, slots=True)
class Chain:
    """Head first."""

    chain_id: int
    version: int
    members: tuple[Member, ...]
    lost_below: int = 0
    """Chunks of files with a smaller inode number may have been lost: see cluster.proto."""
    loss: int = 0
    """How often what was acknowledged and not synced may have been lost."""
    last_boot: str = ""
    """The boot of its machine in which the last serving target served; "": it serves, or nobody knows."""

    @property
    def serving(self) -> tuple[int, ...]:
        return tuple(member.target_id for member in self.members if member.state is Public.SERVING)

    @property
    def last(self) -> int | None:
        """The target that served last, when none does."""
        return next((member.target_id for member in self.members if member.state is Public.LASTSRV), None)

    def with_members(self, members: Sequence[Member]) -> Chain:
        """The next version of the chain."""
        return replace(self, version=self.version + 1, members=tuple(members))

    def without(self, target_id: int) -> Chain:
        return self.with_members([member for member in self.members if member.target_id != target_id])


# Places in the chain. LASTSRV before OFFLINE: it will be the head when it returns.
_RANK = {Public.SERVING: 0, Public.SYNCING: 1, Public.WAITING: 2, Public.LASTSRV: 3, Public.OFFLINE: 4}


def next_public(local: Local, public: Public, *, predecessor_serves: bool, another_serves: bool) -> Public:
    """One row of the table. `another_serves`: some other target of the chain serves, so this one may go without being missed."""
    match public:
        case Public.SERVING:
            if local is Local.OFFLINE:
                return Public.OFFLINE if another_serves else Public.LASTSRV
            return Public.SERVING
        case Public.SYNCING:
            if local is Local.OFFLINE:
                return Public.OFFLINE
            if local is Local.UPTODATE:
                return Public.SERVING
            return Public.SYNCING if predecessor_serves else Public.WAITING
        case Public.WAITING:
            if local is Local.OFFLINE:
                return Public.OFFLINE
            return Public.SYNCING if local is Local.ONLINE and predecessor_serves else Public.WAITING
        case Public.LASTSRV:
            return Public.SERVING if local in (Local.UPTODATE, Local.ONLINE) else Public.LASTSRV
        case Public.OFFLINE:
            return Public.WAITING if local in (Local.UPTODATE, Local.ONLINE) else Public.OFFLINE


def heard(local: Local, public: Public, *, blank: bool, told_version: int, chain_version: int) -> Local:
    """What counts of a target's report. `told_version`: the chain version that it knew, 0: it did not say. `blank`: it came back without its data."""
    if public is Public.LASTSRV and blank:
        return Local.OFFLINE  # it must not revive the chain
    if local is Local.UPTODATE and public is Public.SYNCING and 0 < told_version < chain_version:
        return Local.ONLINE  # up to date in an earlier shape of the chain, perhaps before it lost its feeder: it has to say so again
    return local


_NO_BOOTS: Mapping[int, str] = {}


def advance(chain: Chain, locals_: Mapping[int, Local], boots: Mapping[int, str] = _NO_BOOTS) -> Chain:
    """The chain after one scan. Targets that `locals_` lacks are UNKNOWN. The same object when nothing changes. `boots`: in which boot of its machine
    each target's process runs, or ran; one that is not known counts as another."""

    def local(target_id: int) -> Local:
        return locals_.get(target_id, Local.UNKNOWN)

    states = {member.target_id: member.state for member in chain.members}

    # First what needs no neighbour. Those that come into service go before those that leave it: with a replica that has just become complete, a dying
    # one is not the last. Those that leave are taken from the head, so that of several the tail is the last serving one: it has committed every
    # write that anyone ever saw, while the others may hold it as pending only.
    for member in chain.members:
        target = member.target_id
        if member.state is Public.LASTSRV or (member.state is Public.SYNCING and local(target) is Local.UPTODATE):
            states[target] = next_public(local(target), member.state, predecessor_serves=False, another_serves=False)
    for member in chain.members:
        target = member.target_id
        if member.state in (Public.SERVING, Public.OFFLINE) or local(target) is Local.OFFLINE:
            another = any(state is Public.SERVING for other, state in states.items() if other != target)
            states[target] = next_public(local(target), states[target], predecessor_serves=False, another_serves=another)

    # Then the order, which decides who stands before whom.
    gone = {member.target_id for member in chain.members if member.state is not Public.OFFLINE and states[member.target_id] is Public.OFFLINE}
    order = sorted(chain.members, key=lambda member: (_RANK[states[member.target_id]], member.target_id in gone))

    # Then, from the head, what depends on the target before. One that has only just come back waits for the next scan.
    members: list[Member] = []
    for member in order:
        state = states[member.target_id]
        if member.state in (Public.SYNCING, Public.WAITING) and state is member.state:
            serves = bool(members) and members[-1].state is Public.SERVING
            state = next_public(local(member.target_id), state, predecessor_serves=serves, another_serves=serves)
        members.append(Member(member.target_id, state))

    if tuple(members) == chain.members:
        return chain
    return _judged(chain, chain.with_members(members), boots)


def _judged(before: Chain, after: Chain, boots: Mapping[int, str]) -> Chain:
    """Whether what only the page caches of the replicas had is still there. While one target serves on, it has it all; the last one serving has it
    when it returns in the boot in which it served: a process that dies leaves the page cache, power that goes does not."""
    if after.last == before.last:
        return after
    if after.last is not None:
        return replace(after, last_boot=boots.get(after.last, ""))
    assert before.last is not None
    kept = before.last_boot and boots.get(before.last) == before.last_boot
    return replace(after, last_boot="", loss=after.loss if kept else after.loss + 1)


def problems(chain: Chain) -> list[str]:
    """What is wrong with a chain by the invariants above; empty for a sound one."""
    states = [member.state for member in chain.members]
    found = []
    if [_RANK[state] for state in states] != sorted(_RANK[state] for state in states):
        found.append(f"chain {chain.chain_id}: targets out of order: {states}")
    serving, lastsrv, syncing = (states.count(state) for state in (Public.SERVING, Public.LASTSRV, Public.SYNCING))
    if states and lastsrv != (0 if serving else 1):
        found.append(f"chain {chain.chain_id}: {serving} serving and {lastsrv} last-serving targets")
    if syncing > 1:
        found.append(f"chain {chain.chain_id}: {syncing} targets are syncing")
    if syncing and not serving:
        found.append(f"chain {chain.chain_id}: a target is syncing and none feeds it")
    if chain.last_boot and not lastsrv:
        found.append(f"chain {chain.chain_id}: a boot is kept of a last-serving target, and there is none")
    return found
