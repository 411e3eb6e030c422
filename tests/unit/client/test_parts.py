"""The small parts: placement, tags, batches, waits, locating a cluster, settings, error mapping, memory."""

from __future__ import annotations

import errno
import gc
import json
import threading
from pathlib import Path

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.client.fakes import run

from kvfs.client.batch import group_by_node
from kvfs.client.config import ClientConfig
from kvfs.client.file.memory import Memory
from kvfs.client.locate import locate
from kvfs.client.os_errors import to_os_error
from kvfs.client.paths import components, flags_of
from kvfs.client.peers import Counters
from kvfs.client.placement import Placement
from kvfs.client.retry import Attempts
from kvfs.client.tags import Channels
from kvfs.common.boundary.random import SeededRandom
from kvfs.common.errors import (
    BY_CODE,
    ClusterNotFound,
    ConfigError,
    ConnectionLost,
    DeadlineExceeded,
    InputOutput,
    InvalidArgument,
    NotFound,
    SetupError,
    Unreachable,
)
from kvfs.common.ids import chunk_id
from kvfs.common.transport.region import BufferPool
from kvfs.common.wire import meta_pb2


def placement(chunk_size: int, chains: list[int]) -> Placement:
    return Placement.of(meta_pb2.Inode(inode=5, layout=meta_pb2.Layout(chunk_size=chunk_size, chain_ids=chains)))


@pytest.mark.parametrize("chunk_size", [1, 65535, (64 << 20) + 1, 1 << 31])
def test_a_layout_that_no_file_has_is_refused(chunk_size: int) -> None:
    """Found by a million wrong answers (seed 2026): with chunks of one byte a write of 150,000 bytes took 76 s."""
    with pytest.raises(InputOutput, match=f"chunks of {chunk_size} bytes"):
        placement(chunk_size, [10])


@given(st.integers(0, 1 << 40), st.integers(0, 1 << 20))
def test_pieces_cover_the_range_in_order_and_never_cross_a_chunk(offset: int, length: int) -> None:
    made = placement(65536, [10, 11, 12])
    at = offset
    for piece in made.pieces(offset, length):
        assert piece.index * 65536 + piece.offset == at
        assert piece.start == at - offset
        assert 0 < piece.length <= 65536 - piece.offset
        at += piece.length
    assert at == offset + length


def test_chunks_go_round_the_chains() -> None:
    made = placement(65536, [10, 11, 12])
    assert [made.chain(index) for index in range(5)] == [10, 11, 12, 10, 11]
    assert made.chunk(3) == chunk_id(5, 3)
    assert made.chains_up_to(0) == ()
    assert made.chains_up_to(65537) == (10, 11)
    assert made.chains_up_to(1 << 40) == (10, 11, 12)
    with pytest.raises(InvalidArgument):
        made.pieces(-1, 5)


def test_tags_grow_by_one_a_channel_and_batches_wait_their_turn() -> None:
    async def test() -> None:
        channels = Channels(b"c" * 16, 4)
        first = await channels.acquire(3)
        assert len({tag.channel for tag in first}) == 3
        order: list[str] = []

        async def take(name: str, count: int) -> None:
            tags = await channels.acquire(count)
            order.append(name)
            channels.release(tags)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(take, "big", 4)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(take, "small", 1)  # one is free, but the big batch was first
            await trio.testing.wait_all_tasks_blocked()
            assert order == []
            channels.release(first)
        assert order == ["big", "small"]
        again = await channels.acquire(4)
        for tag in again:
            earlier = [old.sequence for old in first if old.channel == tag.channel]
            assert all(tag.sequence > sequence for sequence in earlier)
        with pytest.raises(InvalidArgument):
            await channels.acquire(5)
        with trio.move_on_after(0.01):
            await channels.acquire(1)
        channels.release(again)
        assert len(await channels.acquire(4)) == 4  # a waiter that gave up left nothing behind

    run(test)


def test_groups_are_bounded_and_never_mix_nodes() -> None:
    operations = [(index, 100 + index % 2, index % 2, ("a",), 10) for index in range(10)]
    groups = group_by_node(operations, max_ios=3, max_bytes=1000)
    assert [(group.node_id, group.indexes) for group in groups] == [(0, [0, 2, 4]), (1, [1, 3, 5]), (0, [6, 8]), (1, [7, 9])]
    assert [group.indexes for group in group_by_node(operations[:4], max_ios=100, max_bytes=15)] == [[0], [1], [2], [3]]
    assert len(group_by_node([(0, 1, 1, (), 10**9)], max_ios=1, max_bytes=1)) == 1


def test_waits_grow_and_stop_at_the_deadline() -> None:
    class Clock:
        now = 0.0
        slept: list[float] = []  # noqa: RUF012

        def monotonic(self) -> float:
            return self.now

        async def sleep(self, seconds: float) -> None:
            self.slept.append(seconds)
            self.now += seconds

    async def test() -> None:
        clock = Clock()
        attempts = Attempts(clock, SeededRandom(1), deadline=3.0, attempt_s=1.0, first_s=0.01, max_s=0.5)  # type: ignore[arg-type]
        assert attempts.timeout_s() == 1.0
        with pytest.raises(NotFound):
            await attempts.wait(NotFound("final"))
        with pytest.raises(DeadlineExceeded) as caught:
            while True:
                await attempts.wait(Unreachable("gone"))
        assert isinstance(caught.value.__cause__, Unreachable)
        assert clock.now <= 3.0
        assert all(0.005 <= pause <= 0.5 for pause in clock.slept)
        assert clock.slept[5] > clock.slept[0]
        assert attempts.timeout_s() == pytest.approx(3.0 - clock.now)

    run(test)


def test_a_cluster_is_found_by_directory_address_or_environment(tmp_path: Path) -> None:
    (tmp_path / "cluster.json").write_text(json.dumps({"cluster_id": "c1", "managers": ["tcp://127.0.0.1:7001"]}))
    found = locate(tmp_path)
    assert found.managers == ("tcp://127.0.0.1:7001",)
    assert found.cluster_id == "c1"
    assert locate("", {"KVFS_CLUSTER": str(tmp_path)}) == found
    assert locate("a:1, b:2").managers == ("tcp://a:1", "tcp://b:2")
    assert locate("unix:///x.sock").managers == ("unix:///x.sock",)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "cluster.json").write_text("{")
    for wrong in (tmp_path / "nowhere", tmp_path / "broken", "nonsense", "host:99999", "", "host:"):
        with pytest.raises(ClusterNotFound):
            locate(wrong, {})


def test_settings_are_checked() -> None:
    for wrong in ({"deadline_s": 0}, {"buffer_pool_bytes": 5}, {"channels": 0}, {"batch_max_ios": 1000}, {"read_ahead_bytes": -1}):
        with pytest.raises(ConfigError):
            ClientConfig(**wrong)  # type: ignore[arg-type]


def test_every_error_of_the_tree_becomes_an_oserror_with_its_errno() -> None:
    for cls in BY_CODE.values():
        made = to_os_error(cls("what happened"), "/a")
        if issubclass(cls, SetupError):
            assert isinstance(made, cls)
            continue
        assert isinstance(made, OSError)
        assert made.errno == cls.errno
        assert made.filename == "/a"
        assert isinstance(made.__cause__, cls)
    assert isinstance(to_os_error(NotFound("x")), FileNotFoundError)
    assert isinstance(to_os_error(ConnectionLost("x")), ConnectionResetError)
    assert isinstance(to_os_error(DeadlineExceeded("x")), TimeoutError)
    assert to_os_error(NotFound("x")).errno == errno.ENOENT  # type: ignore[attr-defined]


def test_paths_and_modes() -> None:
    assert components("/a//b/./c/") == [b"a", b"b", b"c"]
    assert components(Path("a/ü")) == [b"a", "ü".encode()]
    assert components("/") == []
    with pytest.raises(InvalidArgument):
        components("a\0b")
    for wrong in ("", "rw", "q", "rr", "r+x", "b"):
        with pytest.raises(InvalidArgument):
            flags_of(wrong)


def test_lent_memory_comes_back_from_whatever_thread_drops_it() -> None:
    memory = Memory(BufferPool(1 << 20), Counters())
    block = memory.allocate(100_000)
    block.view[:] = b"x" * 100_000
    view = block.lend(10, 20)
    part = view[2:4]
    block.release()
    assert memory.pool.free_bytes < memory.pool.total_bytes
    assert view.readonly
    holder = [view, part]
    del view, part

    def drop() -> None:
        holder.clear()
        gc.collect()

    thread = threading.Thread(target=drop)
    thread.start()
    thread.join()
    memory.reclaim()
    assert memory.pool.free_bytes == memory.pool.total_bytes
    many = [memory.allocate(1 << 19) for _ in range(4)]
    assert [made.span is None for made in many] == [False, False, True, True]
    assert isinstance(many[3].lend(0, 10), memoryview)
    for made in many:
        made.release()
    with pytest.raises(AssertionError):
        many[0].release()
    memory.close()
