"""Is the simulation an honest checker? Mistakes are planted in the product, and it has to find each within LIMIT seeds.

A plant replaces the methods that decide something, from here: the product holds no code for it. It counts as found by a seed that fails with it and
passes without it, and fails by a broken promise: what ends a run by an exception of its own is not counted. `make planted` searches from seed 1 and
prints a table; `--only NAME` one of them. test_planted.py plants each under its known seed.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from tests.sim.many import each
from tests.sim.run import Verdict, run_seed
from tests.sim.stress import is_stress

from kvfs.client import storage_reads
from kvfs.client.file.unsynced import Unsynced
from kvfs.common.checksum import checksums
from kvfs.common.errors import ChainVersionMismatch, TargetNotServing
from kvfs.common.membership import ManagerLink
from kvfs.meta.namespace.step import Step
from kvfs.storage import returning
from kvfs.storage.chain.compare import Listed
from kvfs.storage.chain.flight import Flight, Local
from kvfs.storage.chain.messages import FlightEffect, Forward, Incoming, Result, Stored
from kvfs.storage.chain.replica import Replica
from kvfs.storage.engine import reader as engine_reader
from kvfs.storage.engine.allocator import Allocator
from kvfs.storage.engine.classes import Block
from kvfs.storage.engine.requests import UpdateKind
from kvfs.storage.forwards import Forwarder
from kvfs.storage.reads import Reader
from kvfs.storage.resync import Resync
from kvfs.storage.target import Target

LIMIT = 2000
Patch = tuple[Any, str, Any]
"""Whose attribute, which, what it becomes."""
PLANTS: dict[str, Plant] = {}


@dataclass(frozen=True, slots=True)
class Plant:
    what: str
    patches: tuple[Patch, ...]


@contextmanager
def planted(plant: Plant) -> Iterator[None]:
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in plant.patches]
    for owner, name, mistake in plant.patches:
        assert getattr(owner, name) is not mistake
        setattr(owner, name, mistake)
    try:
        yield
    finally:
        for owner, name, right in before:
            setattr(owner, name, right)


# --- 1: ack before the tail committed ---------------------------------------------------------------------------------------------------

_wait = Replica._wait


def _do_not_wait(self: Replica, flight: Flight, *, refresh: bool) -> list[FlightEffect]:
    """The successor did not answer, or refused: taken for an acknowledgement."""
    successor = self.successor
    if successor is None or flight.local is not Local.PREPARED:
        return _wait(self, flight, refresh=refresh)
    flight.acked_by, flight.acked = successor.target_id, Result(checksum=flight.checksum)
    return self._advance(flight)


# --- 2: commit without checking the chain version ---------------------------------------------------------------------------------------

_screen, _screen_sync = Replica.screen, Replica.screen_sync
_forwarded, _forward_failed = Replica.forwarded, Replica.forward_failed


def _any_version(self: Replica, incoming: Incoming) -> Result | None:
    """Nor whether the sender is the one before in this version: that is refused as ChainVersionMismatch too."""
    refused = _screen(self, replace(incoming, chain_version=self.version))
    return None if refused is not None and refused.status == ChainVersionMismatch.code else refused


def _any_resync(self: Replica, chain_version: int, from_target: int) -> Result | None:
    return _screen_sync(self, self.version, self.predecessor)


def _any_answer(self: Replica, flight: Flight, result: Result) -> list[FlightEffect]:
    flight.forward_version = self.version
    return _forwarded(self, flight, result)


def _any_silence(self: Replica, flight: Flight) -> list[FlightEffect]:
    flight.forward_version = self.version
    return _forward_failed(self, flight)


# --- 3: idempotency tag ignored ---------------------------------------------------------------------------------------------------------


def _never_a_duplicate(self: Replica, incoming: Incoming, stored: Stored) -> Result | None:
    return None


# --- 4: resync skipping a chunk whose version is equal but pending ----------------------------------------------------------------------


async def _list_pending_as_committed(self: Resync, copying: Any, page: Any) -> Any:
    """The successor's list: what is pending there in the version that is committed here is taken for equal."""
    from kvfs.common.wire import storage_pb2 as pb
    from kvfs.storage.resync import LIST_CHUNKS, PAGE

    reply = await self._call(LIST_CHUNKS, pb.ListChunksRequest(target_id=self._successor, after=page.after, limit=PAGE))
    chunks = []
    for chunk in reply.chunks:
        here = self._target.engine.get(chunk.chunk_id)
        if here is not None and here.version and here.version == chunk.pending_version:
            chunks.append(Listed(chunk.chunk_id, here.version, here.length, here.checksum_of_list))
        elif chunk.version:
            chunks.append(Listed(chunk.chunk_id, chunk.version, chunk.length, chunk.checksum))
    return copying.page(False, chunks, reply.chunks[-1].chunk_id if reply.chunks else b"", reply.more)


async def _keep_leftovers(host: Any, target: Target, deadline: float) -> None:
    """So that pending versions are there to be skipped."""


# --- 5: freed block reused before the index commit --------------------------------------------------------------------------------------


def _free_at_once(self: Allocator, block: Block, sequence: int, *, removed: bool = False) -> None:
    self._leave_quarantine(block)


# --- 6: truncate forwarded as a plain write while syncing -------------------------------------------------------------------------------

_forward, _pack, _screen_forward, _disagree = Replica._forward, Forwarder._pack, Replica._screen_forward, Replica._disagree


def _truncate_as_write(self: Replica, flight: Flight, successor: Any) -> Forward:
    effect = _forward(self, flight, successor)
    if successor.syncing and effect.kind is UpdateKind.TRUNCATE:
        return replace(effect, kind=UpdateKind.WRITE)
    return effect


async def _pack_a_byte(self: Forwarder, parcel: Any, effect: Forward, until: float) -> None:
    """A plain write has bytes: one zero where the file is to end."""
    await _pack(self, parcel, effect, until)
    if effect.kind is UpdateKind.WRITE and effect.flight.kind is UpdateKind.TRUNCATE:
        write = parcel.writes[-1]
        write.offset, write.length = max(0, write.length - 1), 1
        write.checksums = checksums(memoryview(b"\0"), write.offset)
        parcel.buffers.append(memoryview(b"\0"))


def _take_plain_writes(self: Replica, incoming: Incoming, stored: Stored) -> Result | None:
    if self.syncing and incoming.kind is UpdateKind.WRITE and stored.version and incoming.update_version == stored.version + 1:
        return None
    return _screen_forward(self, incoming, stored)


def _agree_on_truncations(self: Replica, flight: Flight, successor: Any) -> list[FlightEffect]:
    """Else the difference would be seen and mended at once."""
    if flight.kind is UpdateKind.TRUNCATE and successor.syncing:
        flight.acked = replace(flight.acked, checksum=flight.checksum)
        return self._advance(flight)
    return _disagree(self, flight, successor)


# --- 7: lease trusted past its end ------------------------------------------------------------------------------------------------------


def _for_ever(self: ManagerLink) -> bool:
    return True


# --- 8: stale read from a target not serving --------------------------------------------------------------------------------------------

_target_for = Reader.target_for


def _whatever_it_is(self: Reader, target_id: int) -> Target:
    target = self._host.target(target_id)
    if not self._host.link.lease_valid():
        raise TargetNotServing("the lease is over")
    return target if target.opened else _target_for(self, target_id)


# --- 9: checksum not verified on read ---------------------------------------------------------------------------------------------------

_take = storage_reads.ReadPath._take


def _take_unseen(self: Any, run: Any, index: int, target: int, buffer: Any, result: Any, found: bytes | None) -> None:
    _take(self, run, index, target, buffer, result, result.checksums)


def _all_right(content: Any, unit: int, view: memoryview, what: bytes) -> None:
    pass


# --- 10: unlink losing to a concurrent open-for-write -----------------------------------------------------------------------------------


def _nobody_has_it_open(self: Step, number: int) -> bool:
    return False


# --- 11: an fsync that hides a loss of power --------------------------------------------------------------------------------------------


def _nothing_was_lost(self: Unsynced, losses: Mapping[int, int], mark: int) -> list[int]:
    return []


PLANTS.update(
    {
        "early-ack": Plant("ack before the tail committed", ((Replica, "_wait", _do_not_wait),)),
        "chain-version": Plant(
            "commit without checking the chain version",
            (
                (Replica, "screen", _any_version),
                (Replica, "screen_sync", _any_resync),
                (Replica, "forwarded", _any_answer),
                (Replica, "forward_failed", _any_silence),
            ),
        ),
        "tag": Plant("idempotency tag ignored", ((Replica, "_duplicate", _never_a_duplicate),)),
        "resync-skip": Plant(
            "resync skipping a chunk whose version is equal but pending",
            ((Resync, "_list_remote", _list_pending_as_committed), (returning, "drop_leftovers", _keep_leftovers)),
        ),
        "block-reuse": Plant("freed block reused before the index commit", ((Allocator, "quarantine", _free_at_once),)),
        "truncate": Plant(
            "truncate forwarded as a plain write while syncing",
            (
                (Replica, "_forward", _truncate_as_write),
                (Forwarder, "_pack", _pack_a_byte),
                (Replica, "_screen_forward", _take_plain_writes),
                (Replica, "_disagree", _agree_on_truncations),
            ),
        ),
        "lease": Plant("lease trusted past its end", ((ManagerLink, "lease_valid", _for_ever),)),
        "not-serving": Plant("stale read from a target not serving", ((Reader, "target_for", _whatever_it_is),)),
        "checksum": Plant(
            "checksum not verified on read",
            ((storage_reads.ReadPath, "_take", _take_unseen), (engine_reader, "_verify_unit", _all_right)),
        ),
        "unlink": Plant("unlink losing to a concurrent open-for-write", ((Step, "has_sessions", _nobody_has_it_open),)),
        "loss": Plant("fsync succeeding after all replicas lost power", ((Unsynced, "synced", _nothing_was_lost),)),
    }
)


FOUND: dict[str, int] = {
    "early-ack": 8,
    "chain-version": 27,
    "tag": 6,
    "resync-skip": 15,
    "block-reuse": 129,
    "truncate": 24,
    "lease": 57,
    "not-serving": 60,
    "checksum": 57,
    "unlink": 3,
    "loss": 90,
}
"""A seed that finds it, a cheap one where there is a choice. A change of the product's messages changes what every seed does: then search anew."""


def broken(verdict: Verdict) -> list[str]:
    """The promises that a run broke: not that it fell over."""
    return [problem for problem in verdict.problems if "ended with" not in problem]


def finds(name: str, seed: int) -> tuple[int, list[str]]:
    """What this seed says with the mistake, if it says nothing without."""
    with planted(PLANTS[name]):
        found = broken(run_seed(seed))
    if found and run_seed(seed).problems:
        found = []
    return seed, found


def search(name: str, seeds: Iterable[int], processes: int, tell: Callable[[str], None]) -> tuple[int, str] | None:
    """The first seed that finds it, and what it says."""
    for seed, problems in each(partial(finds, name), seeds, processes):
        if problems:
            return seed, problems[0]
        if seed % 50 == 0:
            tell(f"{name}: not by the seeds up to {seed}")
    return None


def main() -> int:
    parser = argparse.ArgumentParser(prog="make planted", description=__doc__)
    parser.add_argument("--only", choices=PLANTS, action="append", help="this one; several times for several")
    parser.add_argument("--first", type=int, default=1, help="the first seed")
    parser.add_argument("--limit", type=int, default=LIMIT, help="how many seeds at most")
    parser.add_argument("--stress", action="store_true", help="only seeds of the stressing kind: then the number is an upper bound")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    missed = 0
    seeds = [seed for seed in range(arguments.first, arguments.first + arguments.limit) if is_stress(seed) or not arguments.stress]
    print("| planted | seeds to find it | what the finding seed says |\n|---|---|---|", flush=True)
    for name in arguments.only or PLANTS:
        found = search(name, seeds, arguments.processes, lambda line: print(line, file=sys.stderr, flush=True))
        if found is None:
            missed += 1
            print(f"| {PLANTS[name].what} | not within {arguments.limit} | |", flush=True)
        else:
            seed, problem = found
            words = " ".join(problem.replace("|", "/").split())[:160]
            print(f"| {PLANTS[name].what} | {seed - arguments.first + 1} | {words} |", flush=True)
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())
