"""A round of updates whose chain changes under it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import trio

from kvfs.common.boundary.clock import SystemClock
from kvfs.common.boundary.real_disk import RealDisk
from kvfs.common.checksum import checksums
from kvfs.common.ids import chunk_id
from kvfs.common.wire import storage_pb2 as pb
from kvfs.storage.chain import messages as m
from kvfs.storage.chain.messages import Incoming
from kvfs.storage.chain.replica import Replica
from kvfs.storage.chain.view import ChainView, PublicState
from kvfs.storage.config import StorageConfig
from kvfs.storage.engine.engine import ChunkEngine
from kvfs.storage.engine.requests import UpdateKind
from kvfs.storage.engine.superblock import Superblock
from kvfs.storage.forwards import Forwarder
from kvfs.storage.host import Host
from kvfs.storage.retention.retention import Retention
from kvfs.storage.scrub.state import ScrubState
from kvfs.storage.target import Target
from kvfs.storage.updates import INLINE_BYTES, Item, Round
from kvfs.storage.workers import WorkerPool

CHUNK = chunk_id(5, 0)


@pytest.mark.parametrize("left", [True, False])
def test_a_successor_that_goes_while_the_local_copy_is_written_is_waited_for_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: bool
) -> None:
    """Found by CI: the forward failed, the chain went on without the successor, the local copy was committed, and then the wait was looked at.
    `left`: the forward had been sent, so that the copy was begun beside it; else it is made all the same."""

    async def main() -> None:
        clock = SystemClock()
        engine = ChunkEngine(RealDisk(tmp_path), clock, Superblock("test", 1))
        workers = WorkerPool(1)
        replica = Replica(1, fresh=True)

        async def lost(self: Forwarder, forwards: Sequence[m.Forward], sent: Callable[[], None]) -> list[m.FlightEffect]:
            [forward] = forwards
            if left:
                sent()
            effects = replica.forward_failed(forward.flight)
            assert [type(effect) for effect in effects] == [m.Wait]
            replica.on_chain(ChainView.of(1, 3, [(1, PublicState.SERVING), (2, PublicState.OFFLINE)]))
            return effects

        monkeypatch.setattr(Forwarder, "send", lost)
        async with trio.open_nursery() as nursery:
            link = SimpleNamespace(report_now=lambda: None, node_id=1)
            host = Host(StorageConfig(data=("x",)), clock, None, link, workers, None, nursery)  # type: ignore[arg-type]
            target = Target(1, 1, 0, "x", engine, replica, Retention(clock, engine), ScrubState(clock, engine))
            replica.on_chain(ChainView.of(1, 2, [(1, PublicState.SERVING), (2, PublicState.SERVING)]))
            data = memoryview(bytes(2 * INLINE_BYTES))  # written in a thread, beside the forward
            io = pb.WriteIO(chunk_id=CHUNK, length=len(data), chunk_size=1 << 20, checksums=checksums(data, 0), chain_version=2)
            item = Item(target, CHUNK, Incoming(CHUNK, UpdateKind.WRITE, 2, len(data)), io, data)
            await Round(host, [item], clock.monotonic() + 5).run()
            assert item.result is not None and (item.result.status, item.result.version) == (0, 1)
            meta = engine.get(CHUNK)
            assert meta is not None and (meta.version, meta.pending) == (1, None)
            nursery.cancel_scope.cancel()
        workers.close()
        engine.close()

    trio.run(main)
