"""A storage service that lost its manager, or was stopped and goes on, serves nothing that others may have changed: no bytes, no places of bytes, no
writes, and no file whose descriptor a client still holds.

Three clients at once: one that writes and follows the cluster, one with stale routing that asks only this service, over and over, also while it is
stopped (so its questions wait in the service's sockets), and one that reads a file by places. All they see goes through the checker. With
KVFS_HISTORIES set, at every place of the chain."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest
import trio
from tests.histories.checker import check
from tests.histories.explain import report
from tests.histories.history import History, fill, name_of
from tests.histories.models import Register
from tests.network import Network, why_not
from tests.process_cluster import ProcessCluster, names

from kvfs.client.async_client import AsyncClient, open_client
from kvfs.client.config import ClientConfig
from kvfs.client.peers import Peers
from kvfs.client.place import Read
from kvfs.client.placement import Placement
from kvfs.client.storage_client import StorageClient
from kvfs.client.storage_places import ChunkRange
from kvfs.client.storage_reads import READ, choose
from kvfs.client.storage_writes import ChunkWrite
from kvfs.common.boundary.clock import SystemClock
from kvfs.common.boundary.random import SystemRandom
from kvfs.common.boundary.system_net import SystemNet
from kvfs.common.errors import KvfsError
from kvfs.common.routing import Routing
from kvfs.common.wire import cluster_pb2
from kvfs.common.wire import storage_pb2 as pb
from kvfs.common.wire.channel import ChannelPool
from kvfs.common.wire.identity import Identity

pytestmark = pytest.mark.cluster

CUT, STOPPED = "cut off from the manager", "stopped"
CASES = [(CUT, "head"), (STOPPED, "tail"), *([(CUT, "tail"), (STOPPED, "head")] if "KVFS_HISTORIES" in os.environ else [])]
LEASE_S = 1.0
AWAY_S = 2.5
SIZE = 40_000
CHUNK = 1 << 20


@pytest.fixture(scope="module")
def cluster(module_path: Path) -> Iterator[ProcessCluster]:
    if why_not():
        pytest.skip(why_not())
    with Network(names(3)) as network:
        running = ProcessCluster(module_path / "cluster", network)
        try:
            running.create(lease_ms=int(LEASE_S * 1000))
            yield running
        finally:
            running.stop()


class OnlyIt:
    """Routing as it was, with no target but those of one node."""

    def __init__(self, routing: Routing, node_id: int) -> None:
        message = cluster_pb2.RoutingInfo()
        message.CopyFrom(routing.message)
        for chain in message.chains:
            kept = [member for member in chain.targets if routing.target(member.target_id).node_id == node_id]
            del chain.targets[:]
            chain.targets.extend(kept)
        self.routing = Routing(message)

    async def refresh(self, *, timeout_s: float = 5.0) -> Routing:
        return self.routing


@dataclass
class Watch:
    history: History
    served_s: float = 0.0
    """When the service last answered a question that was asked after the fault began."""
    out_s: float = 0.0
    """When the others went on without it."""
    back_s: float = 0.0
    values: Iterator[int] = field(default_factory=itertools.count)


@pytest.mark.parametrize(("fault", "position"), CASES)
def test_it_serves_nothing_that_others_may_have_changed(fault: str, position: str, cluster: ProcessCluster, tmp_path: Path) -> None:
    cluster.wait_serving(3)
    watch = Watch(History(time.monotonic))
    name = trio.run(observe, cluster, fault, position, watch)
    cluster.running[name].wait(10)  # it was declared dead: it must not go on as it is
    cluster.start(name)
    operations = watch.history.operations()
    bad = check(operations, lambda key: Register(initial="0"))
    assert not bad, report(bad, tmp_path / "bad.jsonl")
    answers = [operation for operation in operations if operation.client == "stale" and operation.kind == "read" and operation.known]
    after = [operation for operation in answers if operation.call_s > watch.out_s]
    print(f"{fault}, {position}: last answer {watch.out_s - watch.served_s:.2f} s before the others went on; {len(answers)} answers")
    assert watch.out_s and len(answers) > 5, "the stale client saw nothing before the fault"
    assert not after, f"it served after the others had gone on without it: {after[0]}"


async def observe(cluster: ProcessCluster, fault: str, position: str, watch: Watch) -> str:
    """The name of the service that lost touch."""
    identity = Identity(client_id=SystemRandom().bytes(16))
    async with (
        open_client(str(cluster.path)) as writer,
        open_client(str(cluster.path)) as reader,
        ChannelPool(SystemNet(), SystemClock(), identity) as pool,
        trio.open_nursery() as nursery,
    ):
        path = f"/{fault.split()[0]}-{position}"
        await writer.write_bytes(path, fill("0", SIZE))
        await writer.truncate(path, 64 * CHUNK)
        placement = Placement.of(await writer.stat(path))
        chain = placement.chain(0)
        targets = writer.routing.serving(chain)
        target = targets[0 if position == "head" else -1]
        node = writer.routing.node_of_target(target).node_id
        name = f"storage-{node - 100}"
        mine = [index for index in range(64) if placement.chain(index) == chain]
        read_there = next(index for index in mine[1:] if choose(reader.storage._peers, chain, placement.chunk(index), ()) == target)
        for index in {0, read_there}:
            await writer.storage.write([ChunkWrite(chain, placement.chunk(index), 0, SIZE, CHUNK, fill("0", SIZE))])

        config = ClientConfig(deadline_s=AWAY_S + 3, read_attempt_s=AWAY_S + 2, write_attempt_s=AWAY_S + 2)
        random = SystemRandom()
        peers = Peers(OnlyIt(writer.routing, node), pool, SystemClock(), random, identity.host_id, 0.01)
        stale = StorageClient(peers, config, identity.client_id, nursery)
        nursery.start_soon(ask_it, stale, pool, placement, chain, watch, nursery)
        nursery.start_soon(write_chunk, writer, placement, chain, watch)
        nursery.start_soon(write_file, writer, path, read_there, watch)
        nursery.start_soon(read_file, reader, path, read_there, watch)
        await trio.sleep(0.5)
        before_s = time.monotonic()
        if fault == STOPPED:
            cluster.pause(name)
        else:
            assert cluster.network is not None
            cluster.network.cut(name, "manager")
        with trio.fail_after(20):
            while target in writer.routing.serving(chain):
                await trio.sleep(0.002)
        watch.out_s = time.monotonic()
        await trio.sleep(max(0.0, before_s + AWAY_S - watch.out_s))
        watch.back_s = time.monotonic()
        if fault == STOPPED:
            cluster.resume(name)
        else:
            cluster.network.mend()
        await trio.sleep(1.0)
        nursery.cancel_scope.cancel()
    return name


async def ask_it(stale: StorageClient, pool: ChannelPool, placement: Placement, chain: int, watch: Watch, nursery: trio.Nursery) -> None:
    """A question of each kind every few hundredths of a second, whether those before were answered or not."""
    chunk = placement.chunk(0)
    it = stale.routing.head(chain)
    addresses = stale.routing.addresses_of_target(it)

    async def one(kind: str) -> None:
        value = f"stale-{next(watch.values)}"
        call = watch.history.call("stale", "chunk", "write" if kind == "write" else "read", value if kind == "write" else None)
        into = memoryview(bytearray(SIZE))
        asked_s = time.monotonic()
        try:
            if kind == "write":
                await stale.write([ChunkWrite(chain, chunk, 0, SIZE, CHUNK, fill(value, SIZE))], deadline_s=AWAY_S + 2)
                call.done()
                return
            if kind == "place":
                [place] = await stale.places([ChunkRange(chain, chunk, 0, SIZE)])
                if place is None or place.read(0, into) is not Read.DONE:
                    call.never()
                    return
            else:
                request = pb.ReadRequest()
                request.reads.add(chain_id=chain, target_id=it, chunk_id=chunk, offset=0, length=SIZE)
                reply = await pool.call(addresses, READ, request, timeout_s=AWAY_S + 2, receive=[into])
                if reply.results[0].status:
                    call.never()
                    return
            call.done(name_of(into))
            watch.served_s = max(watch.served_s, asked_s)
        except KvfsError:
            call.unknown() if kind == "write" else call.never()

    for number in itertools.count():
        nursery.start_soon(one, ("bytes", "place", "write")[number % 3])
        await trio.sleep(0.03)


async def write_chunk(writer: AsyncClient, placement: Placement, chain: int, watch: Watch) -> None:
    while True:
        value = f"w{next(watch.values)}"
        update = ChunkWrite(chain, placement.chunk(0), 0, SIZE, CHUNK, fill(value, SIZE))
        await record_write(watch, "chunk", value, partial(writer.storage.write, [update]))
        await trio.sleep(0.02)


async def write_file(writer: AsyncClient, path: str, index: int, watch: Watch) -> None:
    """Written and synced: then every reader has to see it."""
    async with await writer.open(path, "r+b") as file:
        while True:
            value = f"f{next(watch.values)}"

            async def act(value: str = value) -> None:
                await file.file.pwrite(index * CHUNK, [fill(value, SIZE)])
                await file.file.fsync()

            await record_write(watch, "file", value, act)
            await trio.sleep(0.02)


async def record_write(watch: Watch, key: str, value: str, act: Callable[[], Awaitable[object]]) -> None:
    call = watch.history.call("writer", key, "write", value)
    try:
        await act()
        call.done()
    except KvfsError as error:
        call.unknown(type(error).__name__)


async def read_file(reader: AsyncClient, path: str, index: int, watch: Watch) -> None:
    """One open file, read by places while they hold."""
    async with await reader.open(path) as file:
        while True:
            call = watch.history.call("reader", "file", "read")
            try:
                call.done(name_of(await file.file.pread(index * CHUNK, SIZE)))
            except KvfsError:
                call.never()
            await trio.sleep(0.001)
