"""Five clients use ten keys of a real cluster while processes are killed, stopped and cut off from each other: every history is linearizable.

Each run: a cluster in network namespaces, chunks, KV-cache blocks and files, a nemesis by seed; then everything heals, all targets serve, replicas
are identical, fsck is clean, and the checker finds an order for all that was seen. KVFS_HISTORIES=20 makes so many with 1,000 operations a client
(the release run), KVFS_HISTORY_SEED is the first seed, KVFS_HISTORY_DIR keeps them all."""

from __future__ import annotations

import os
import time
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import trio
from tests.cluster.history_clients import CACHE, KEYS, HistoryClient, World, model_of, prepare
from tests.cluster.nemesis import Nemesis
from tests.histories.checker import check
from tests.histories.explain import report
from tests.histories.history import History, Operation, dump
from tests.network import Network, why_not
from tests.process_cluster import ProcessCluster, names

from kvfs.client.async_client import AsyncClient, open_client
from kvfs.kvcache.cache import AsyncKVCache

pytestmark = pytest.mark.cluster

RUNS = int(os.environ.get("KVFS_HISTORIES", "0"))
SEED = int(os.environ.get("KVFS_HISTORY_SEED", "1"))
CLIENTS = 5
OPERATIONS, SECONDS_MAX = (1000, 300.0) if RUNS else (200, 8.0)
PAUSE_S = 0.01
LEASE_MS = 2000
STORAGE, REPLICAS = 3, 3


@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", range(SEED, SEED + max(1, RUNS)))
def test_an_order_explains_all_that_was_seen(seed: int, tmp_path: Path) -> None:
    """Of the three services none, one, two or all share memory with the clients, by the seed."""
    near = (0, 2, 3, 1)[seed % 4]
    network = None if why_not() else Network(names(STORAGE))
    if network is None:
        print(f"no partitions: {why_not()}")
    cluster = ProcessCluster(tmp_path / "cluster", network)
    try:
        cluster.create(storage=STORAGE, replicas=REPLICAS, lease_ms=LEASE_MS, near=near)
        operations, healed_s, nemesis = trio.run(one_run, cluster, seed)
        print(f"seed {seed}, {near} near: {summary(operations, nemesis)}")
        kept = Path(os.environ.get("KVFS_HISTORY_DIR", tmp_path))
        faults = "\n".join(nemesis.said)
        if "KVFS_HISTORY_DIR" in os.environ:
            dump(operations, kept / f"history-{seed}.jsonl")
            (kept / f"faults-{seed}.txt").write_text(faults)
        done = len(operations) - CLIENTS * 2 * len(KEYS)
        assert not RUNS or done == CLIENTS * OPERATIONS, f"{done} operations in {SECONDS_MAX:.0f} s: the machine is too busy for a release run"
        assert sum(nemesis.counts.values()) > 1, "nothing went wrong: the history says nothing"
        bad = check(operations, model_of(healed_s))
        assert not bad, f"seed {seed}\n{report(bad, kept / f'bad-{seed}.jsonl')}\n\nWhat went wrong:\n{faults}"
        known = sum(operation.known for operation in operations)
        assert known > 0.7 * len(operations), f"only {known} of {len(operations)} operations have an outcome"
        found = cluster.json("fsck")
        assert found["clean"], found["problems"]
    finally:
        cluster.stop()
        if network is not None:
            network.close()


async def one_run(cluster: ProcessCluster, seed: int) -> tuple[list[Operation], float, Nemesis]:
    """All operations, when the faults were over, and who made them."""
    history = History(time.monotonic)
    nemesis = Nemesis(cluster, time.monotonic, f"{seed}:nemesis")
    async with AsyncExitStack() as stack:
        opened = [await stack.enter_async_context(open_client(str(cluster.path))) for _ in range(CLIENTS)]
        world = await prepare(opened[0], history)
        clients = [await new_client(number, client, world, seed) for number, client in enumerate(opened)]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(nemesis.run)
            async with trio.open_nursery() as working:
                for client in clients:
                    working.start_soon(client.run, OPERATIONS, PAUSE_S, SECONDS_MAX)
            nursery.cancel_scope.cancel()
        await nemesis.heal()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(nemesis.keep_alive)
            await trio.to_thread.run_sync(lambda: cluster.wait_serving(REPLICAS))
            nursery.cancel_scope.cancel()
        await trio.sleep(CACHE.rest_max_s * 2)  # chains that a client lets rest are a miss
        healed_s = time.monotonic()
        async with trio.open_nursery() as nursery:
            for client in clients:
                nursery.start_soon(client.read_all)
        await replicas_are_identical(opened[0])
        print(f"errors: {world.errors}")
    return history.operations(), healed_s, nemesis


async def new_client(number: int, client: AsyncClient, world: World, seed: int) -> HistoryClient:
    space = await AsyncKVCache(client, CACHE).open("s")
    return HistoryClient(f"c{number}", client, space, world, f"{seed}:{number}")


async def replicas_are_identical(client: AsyncClient) -> None:
    for chain in client.routing.chains:
        held = []
        for member in chain.targets:
            page = await client.storage.list_chunks(member.target_id)
            held.append([(chunk.chunk_id, chunk.length, chunk.checksum, chunk.version, chunk.pending_version) for chunk in page.chunks])
        assert all(each == held[0] for each in held), f"chain {chain.chain_id}: replicas differ: {held}"


def summary(operations: list[Operation], nemesis: Nemesis) -> str:
    unknown = sum(not operation.known for operation in operations)
    last_s = max(operation.end_s or operation.call_s for operation in operations)
    seconds = last_s - min(operation.call_s for operation in operations)
    faults = ", ".join(f"{count} {kind}s" for kind, count in nemesis.counts.items())
    return f"{len(operations)} operations in {seconds:.0f} s, {unknown} of unknown outcome; {faults}"
