"""Puts, gets and lookups of blocks by client processes, timed.

Owns one measurement: a space of its own, clients that fill it, read it at random and ask for keys, and the check that every block read is the one
that was asked for. Invariants: what is timed is the call and nothing else; all clients are ready before any begins; the space is dropped at the end.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b
from typing import Any

from kvfs.cli.context import human_bytes
from kvfs.cli.measure import Advance, cpu_of, percentile
from kvfs.cli.workers import Line, Workers
from kvfs.client import Client
from kvfs.client.config import ClientConfig
from kvfs.common.config import load
from kvfs.common.errors import DataError, InvalidArgument, NotFound
from kvfs.kvcache import KVCache, Put, Space, SpaceParams

BLOCK_TOKENS = 64
KEY_BYTES = 16
EXISTS_KEYS = 256
"""In one call."""
OPERATIONS = ("put", "get", "exists")


@dataclass(frozen=True, slots=True)
class Plan:
    block_bytes: int
    batch: int
    clients: int
    transport: str
    replicas: int
    working_set_bytes: int
    seconds: float

    @property
    def blocks(self) -> int:
        return self.working_set_bytes // self.block_bytes


@dataclass(slots=True)
class Measured:
    """One client's part."""

    blocks: int = 0
    missed: int = 0
    """Not found, or refused."""
    wrong: int = 0
    busy_s: float = 0.0
    cpu_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Row:
    operation: str
    plan: Plan
    batch: int
    blocks: int
    bytes: int
    missed: int
    wall_s: float
    """Of the client that was busy longest."""
    cpu_s: float
    p50_s: float
    """Of one call, as the next."""
    p99_s: float

    def describe(self) -> dict[str, Any]:
        rates = {"blocks_per_s": self.blocks / self.wall_s, "bytes_per_s": self.bytes / self.wall_s}
        facts = asdict(self)
        return {**facts.pop("plan"), **facts, **rates}


def client_config(transport: str) -> ClientConfig:
    """What the environment says, over this transport."""
    return replace(load(ClientConfig, None, os.environ, "client"), shared_memory=transport == "shm")


def block_key(number: int) -> bytes:
    return blake2b(number.to_bytes(8, "little"), digest_size=KEY_BYTES, person=b"kvfs-bench").digest()


def check_room(cluster: str, plans: Sequence[Plan]) -> None:
    """InvalidArgument, if a working set cannot fit: it would be evicted while it is put, after as long as the disks take."""
    with Client(cluster, description="kvfs bench kv") as client:
        _, free_bytes, _ = client.portal.client.routing.space()
    largest = max(plans, key=lambda plan: plan.working_set_bytes * plan.replicas)
    if largest.working_set_bytes * largest.replicas > free_bytes:
        copies = f" in {largest.replicas} copies" if largest.replicas > 1 else ""
        raise InvalidArgument(
            f"a working set of {human_bytes(largest.working_set_bytes)}{copies} does not fit into the {human_bytes(free_bytes)} that the cluster has "
            "free: say a smaller --working-set"
        )


def run(cluster: str, pids: Sequence[int], name: str, plan: Plan, advance: Advance) -> list[Row]:
    """One row an operation. `pids`: of the cluster's processes, whose CPU time is added."""
    with Client(cluster, description="kvfs bench kv") as client:
        cache = KVCache(client)
        try:  # an interrupted create may have made it
            cache.create(name, SpaceParams(block_tokens=BLOCK_TOKENS, block_bytes=plan.block_bytes, replication=plan.replicas))
            with Workers(work, [(cluster, name, plan, number) for number in range(plan.clients)]) as workers:
                workers.ask("open")
                return [_measure(workers, pids, plan, operation, advance) for operation in OPERATIONS]
        finally:
            with suppress(NotFound):
                cache.drop(name)


def _measure(workers: Workers, pids: Sequence[int], plan: Plan, operation: str, advance: Advance) -> Row:
    title = f"{plan.block_bytes >> 10} KiB {operation}, batch {plan.batch}, {plan.transport}, {plan.replicas} copies"
    advance(0, title)
    before_s = cpu_of(pids)
    answers: list[tuple[Measured, list[float]]] = workers.ask(operation, lambda count: advance(count, title))
    services_s = cpu_of(pids) - before_s
    if operation != "put":
        advance(1, title)
    parts = [part for part, _ in answers]
    calls = sorted(seconds for _, each in answers for seconds in each)
    wrong = sum(part.wrong for part in parts)
    if wrong:
        raise DataError(f"{wrong} blocks held bytes of other keys")
    blocks, missed = sum(part.blocks for part in parts), sum(part.missed for part in parts)
    return Row(
        operation,
        plan,
        EXISTS_KEYS if operation == "exists" else plan.batch,
        blocks,
        0 if operation == "exists" else (blocks - missed) * plan.block_bytes,
        missed,
        max(part.busy_s for part in parts),
        services_s + sum(part.cpu_s for part in parts),
        percentile(calls, 0.5),
        percentile(calls, 0.99),
    )


# --- in a client's process -------------------------------------------------------------------------------------------------------------------


def work(line: Line, cluster: str, name: str, plan: Plan, number: int) -> None:
    with Client(cluster, description="kvfs bench kv", config=client_config(plan.transport)) as client:
        space = KVCache(client).open(name)
        worker = _Worker(line, space, plan, number)
        for request in line:
            line.answer(None if request == "open" else worker.timed(getattr(worker, request)))


class _Worker:
    def __init__(self, line: Line, space: Space, plan: Plan, number: int) -> None:
        self.line, self.space, self.plan = line, space, plan
        self.mine = [block_key(place) for place in range(number, plan.blocks, plan.clients)]
        self.everyones = [block_key(place) for place in range(plan.blocks)]
        self.chance = random.Random(number)
        memory = space.buffers(plan.batch)
        self.buffers = [memory[place] for place in range(plan.batch)]
        content = self.chance.randbytes(min(plan.block_bytes, 1 << 20))
        for buffer in self.buffers:
            for start in range(0, plan.block_bytes, len(content)):
                buffer[start : start + len(content)] = content[: plan.block_bytes - start]

    def timed(self, operation: Callable[[Measured, list[float]], None]) -> tuple[Measured, list[float]]:
        part, calls = Measured(), list[float]()
        cpu_s = time.process_time()
        operation(part, calls)
        part.cpu_s = time.process_time() - cpu_s
        part.busy_s = sum(calls)
        return part, calls

    def put(self, part: Measured, calls: list[float]) -> None:
        for start in range(0, len(self.mine), self.plan.batch):
            keys = self.mine[start : start + self.plan.batch]
            blocks = self.buffers[: len(keys)]
            for key, block in zip(keys, blocks, strict=True):
                block[:KEY_BYTES] = key
            began_s = time.perf_counter()
            results = self.space.put(keys, blocks)
            calls.append(time.perf_counter() - began_s)
            part.blocks += len(keys)
            part.missed += results.count(Put.REFUSED)
            self.line.progress(len(keys))

    def get(self, part: Measured, calls: list[float]) -> None:
        until_s = time.perf_counter() + self.plan.seconds
        while time.perf_counter() < until_s:
            keys = self.chance.choices(self.everyones, k=self.plan.batch)
            began_s = time.perf_counter()
            lengths = self.space.get(keys, self.buffers)
            calls.append(time.perf_counter() - began_s)
            part.blocks += len(keys)
            for key, length, block in zip(keys, lengths, self.buffers, strict=True):
                part.missed += length is None
                part.wrong += length is not None and (length != self.plan.block_bytes or block[:KEY_BYTES] != key)

    def exists(self, part: Measured, calls: list[float]) -> None:
        until_s = time.perf_counter() + self.plan.seconds
        while time.perf_counter() < until_s:
            keys = self.chance.choices(self.everyones, k=EXISTS_KEYS)
            began_s = time.perf_counter()
            found = self.space.exists(keys)
            calls.append(time.perf_counter() - began_s)
            part.blocks += len(keys)
            part.missed += found.count(False)
