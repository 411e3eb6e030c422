"""The storage service over real sockets: writes, reads, removal, replicas."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
from mini_cluster import mini_cluster

from kvfs.common.ids import chunk_id
from kvfs.common.wire import storage_pb2 as pb


@pytest.mark.parametrize("replicas", [1, 3])
@pytest.mark.parametrize("shared", [False, True])
def test_write_and_read(tmp_path: Path, replicas: int, shared: bool) -> None:
    async def main() -> None:
        async with mini_cluster(tmp_path, shared=shared) as world:
            for number in range(1, replicas + 1):
                await world.start(number)
            await world.create(replicas, replicas)
            chain = next(iter(world.routing.chains)).chain_id
            data = bytes(range(256)) * 4096
            result = await world.write(chain, chunk_id(5, 0), data)
            assert (result.version, result.chunk_length) == (1, len(data))
            result = await world.write(chain, chunk_id(5, 0), b"hello", offset=100_000)
            assert result.version == 2
            expected = data[:100_000] + b"hello" + data[100_005:]
            for target in world.routing.serving(chain):
                assert await world.read(chain, chunk_id(5, 0), 0, len(data), target=target) == expected
                assert await world.read(chain, chunk_id(5, 0), 99_990, 30, target=target) == expected[99_990:100_020]
                assert await world.read(chain, chunk_id(5, 1), 0, 10, target=target) == b""
            assert await world.assert_identical(chain) == 1
            await world.write(chain, chunk_id(5, 0), b"", kind=pb.REMOVE)
            assert await world.read(chain, chunk_id(5, 0), 0, 10) == b""

    trio.run(main)
