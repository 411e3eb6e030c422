"""When the storage is asked how much of a file is stored, how long the answer holds, and that it never makes a stat fail or wait."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import trio
import trio.testing

from kvfs.common.errors import Unreachable
from kvfs.common.wire import meta_pb2 as pb
from kvfs.fuse.allocation import ASK_AGAIN_S, ASK_TIMEOUT_S, KEPT_MAX, TRUST_LENGTH_S, Allocation

MIB = 1 << 20


class Storage:
    def __init__(self) -> None:
        self.asked: list[int] = []
        self.fail: Exception | None = None
        self.wait_s = 0.0

    async def last_chunk(self, chain_id: int, inode: int) -> Any:
        self.asked.append(chain_id)
        await trio.sleep(self.wait_s)
        if self.fail is not None:
            raise self.fail
        return SimpleNamespace(bytes=MIB)


def file(length: int, *, version: int = 1, writers: int = 0) -> pb.Inode:
    layout = pb.Layout(chunk_size=MIB, chain_ids=[1, 2, 3])
    return pb.Inode(inode=5, type=pb.FILE, length=length, layout=layout, data_version=version, writers=writers)


@pytest.fixture
def storage() -> Storage:
    return Storage()


def test_small_files_are_never_asked_about(storage: Storage) -> None:
    allocation = Allocation(SimpleNamespace(storage=storage))  # type: ignore[arg-type]
    assert not allocation.unsure(file(MIB)) and allocation.unsure(file(MIB + 1))
    assert not allocation.unsure(pb.Inode(inode=1, type=pb.DIRECTORY, length=5 * MIB))


def test_sum_holds_as_long_as_the_version(storage: Storage) -> None:
    async def main() -> None:
        allocation = Allocation(SimpleNamespace(storage=storage))  # type: ignore[arg-type]
        sparse = file(1 << 40)
        assert await allocation.blocks(sparse, sparse.length) == 3 * MIB // 512 and sorted(storage.asked) == [1, 2, 3]
        await trio.sleep(1000)
        assert allocation.known(sparse) == 3 * MIB // 512 and not allocation.unsure(sparse)
        assert allocation.unsure(file(1 << 40, version=2)) and allocation.unsure(file(1 << 39))

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_file_that_is_being_written_is_asked_about_again(storage: Storage) -> None:
    async def main() -> None:
        allocation = Allocation(SimpleNamespace(storage=storage))  # type: ignore[arg-type]
        written = file(5 * MIB, writers=1)
        await allocation.blocks(written, written.length)
        assert not allocation.unsure(written)
        await trio.sleep(ASK_AGAIN_S)
        assert allocation.unsure(written)

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


@pytest.mark.parametrize("trouble", ["error", "slow"])
def test_storage_that_does_not_answer_makes_the_length_count(storage: Storage, trouble: str) -> None:
    async def main() -> None:
        allocation = Allocation(SimpleNamespace(storage=storage))  # type: ignore[arg-type]
        storage.fail = Unreachable("away") if trouble == "error" else None
        storage.wait_s = 100.0 if trouble == "slow" else 0.0
        large = file(4 * MIB)
        started = trio.current_time()
        assert await allocation.blocks(large, large.length) == 4 * MIB // 512
        assert trio.current_time() - started <= ASK_TIMEOUT_S
        assert not allocation.unsure(large), "the next stat does not wait again"
        await trio.sleep(TRUST_LENGTH_S)
        assert allocation.unsure(large)

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_kept_sums_are_bounded(storage: Storage) -> None:
    async def main() -> None:
        allocation = Allocation(SimpleNamespace(storage=storage))  # type: ignore[arg-type]
        allocation._kept.update(dict.fromkeys(range(10, KEPT_MAX + 10), ((1, 1, 1, 1), 1, 0.0, 1.0)))
        await allocation.blocks(file(2 * MIB), 2 * MIB)
        assert len(allocation._kept) == KEPT_MAX

    trio.run(main)
