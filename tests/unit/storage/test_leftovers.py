"""A pending version that a former run of the process left behind."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import trio

from kvfs.common.boundary.clock import SystemClock
from kvfs.common.boundary.real_disk import RealDisk
from kvfs.common.checksum import checksums
from kvfs.common.ids import chunk_id
from kvfs.common.transport.region import BufferPool
from kvfs.storage.chain.messages import Incoming, ResolveLeftovers, TagKey, record_of
from kvfs.storage.chain.replica import Replica
from kvfs.storage.chain.view import ChainView, PublicState
from kvfs.storage.config import StorageConfig
from kvfs.storage.engine.engine import ChunkEngine
from kvfs.storage.engine.requests import Tag, Update, UpdateKind
from kvfs.storage.engine.superblock import Superblock
from kvfs.storage.host import Host
from kvfs.storage.retention.retention import Retention
from kvfs.storage.scrub.state import ScrubState
from kvfs.storage.target import Target
from kvfs.storage.updates import carry_on
from kvfs.storage.workers import WorkerPool

CHUNK = chunk_id(5, 0)
CLIENT = bytes(range(16))


def test_the_last_one_serving_commits_it_with_its_tag(tmp_path: Path) -> None:
    async def main() -> None:
        clock = SystemClock()
        data = memoryview(b"second")
        engine = ChunkEngine(RealDisk(tmp_path), clock, Superblock("test", 1))
        engine.apply(Update(CHUNK, length=5, data=memoryview(b"first"), checksums=checksums(b"first", 0)), 1)
        engine.prepare(Update(CHUNK, length=6, data=data, checksums=checksums(data, 0), update_version=2, tag=Tag(CLIENT, 3, 7)))
        engine.close()
        engine = ChunkEngine(RealDisk(tmp_path), clock, Superblock("test", 1))
        workers = WorkerPool(1)
        async with trio.open_nursery() as nursery:
            link = SimpleNamespace(report_now=lambda: None, node_id=1)
            host = Host(StorageConfig(data=("x",)), clock, None, link, workers, None, nursery)  # type: ignore[arg-type]
            replica = Replica(1, fresh=False)
            target = Target(1, 1, 0, "x", engine, replica, Retention(clock, engine), ScrubState(clock, engine))
            replica.on_chain(ChainView.of(1, 2, [(1, PublicState.LASTSRV)]))
            assert ResolveLeftovers() in replica.on_chain(ChainView.of(1, 3, [(1, PublicState.SERVING)]))
            assert target.pending_chunks() == [CHUNK]
            await carry_on(host, target, [CHUNK])
            meta = engine.get(CHUNK)
            assert meta is not None and (meta.version, meta.length, meta.pending) == (2, 6, None)
            assert engine.tag(CLIENT, 3) == Tag(CLIENT, 3, 7, record_of(2))
            # The client's retry: answered, not applied.
            retry = Incoming(CHUNK, UpdateKind.WRITE, 3, 6, TagKey(CLIENT, 3, 7))
            flight, effects = replica.receive(retry, target.stored(CHUNK, retry.tag))
            assert flight.done and effects[0].result.version == 2  # type: ignore[union-attr]
            nursery.cancel_scope.cancel()
        workers.close()
        engine.close()

    trio.run(main)


def test_one_whose_bytes_went_bad_makes_way_for_the_predecessor(tmp_path: Path) -> None:
    """In the middle of a chain the bad bytes are not tried again and again under the chunk's lock: who is before has the update too."""

    async def main() -> None:
        clock = SystemClock()
        data = b"second" * 1000
        engine = ChunkEngine(RealDisk(tmp_path), clock, Superblock("test", 1))
        engine.apply(Update(CHUNK, length=5, data=memoryview(b"first"), checksums=checksums(b"first", 0)), 1)
        engine.prepare(Update(CHUNK, length=len(data), data=memoryview(data), checksums=checksums(data, 0), update_version=2))
        for path in (tmp_path / "data").iterdir():
            at = path.read_bytes().find(data)
            if at >= 0:
                with open(path, "r+b") as file:
                    file.seek(at + 100)
                    file.write(b"?")
        workers = WorkerPool(1)
        asked: list[object] = []

        async def call(*args: object, **kwargs: object) -> None:
            asked.append(args)

        async with trio.open_nursery() as nursery:
            routing = SimpleNamespace(addresses_of_target=lambda target: ("tcp://nowhere:1",))
            link = SimpleNamespace(report_now=lambda: None, node_id=1, routing=routing)
            pool = SimpleNamespace(call=call)
            host = Host(StorageConfig(data=("x",)), clock, pool, link, workers, BufferPool(1 << 20), nursery)  # type: ignore[arg-type]
            replica = Replica(1, fresh=True)
            target = Target(1, 1, 0, "x", engine, replica, Retention(clock, engine), ScrubState(clock, engine))
            replica.on_chain(ChainView.of(1, 2, [(member, PublicState.SERVING) for member in (2, 1, 3)]))
            with trio.fail_after(host.config.give_up_ms / 1000 / 4):
                await carry_on(host, target, [CHUNK])
            assert replica.serving
            assert not asked, "bad bytes are not sent"
            assert not len(host.locks), "the chunk is free for whoever has the right bytes"
            assert not replica.flights
            nursery.cancel_scope.cancel()
        workers.close()
        engine.close()

    trio.run(main)
