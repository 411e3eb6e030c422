"""Reads and writes of chunks when things fail: other replicas, newer routing, the same tag, checksums."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable

import pytest
import trio
from tests.unit.client.fakes import CHUNK, World, run, world

from kvfs.client.config import ClientConfig
from kvfs.client.storage_reads import ChunkRead
from kvfs.client.storage_writes import ChunkWrite
from kvfs.common.errors import (
    ChainVersionMismatch,
    ChecksumMismatch,
    DeadlineExceeded,
    InputOutput,
    NoServingTarget,
    NoSpace,
    NotChainHead,
    TargetNotServing,
)
from kvfs.common.ids import ChunkId, chunk_id
from kvfs.common.wire import cluster_pb2

ID = chunk_id(9, 0)


def reading(place: World, chunk: ChunkId = ID, length: int = 100, chain: int = 1) -> ChunkRead:
    return ChunkRead(chain, chunk, 0, length, place.client.memory.allocate(length).part(0, length))


def writing(data: bytes, chain: int = 1, chunk: ChunkId = ID) -> ChunkWrite:
    return ChunkWrite(chain, chunk, 0, len(data), CHUNK, data)


def head_of(place: World, chain: int = 1) -> int:
    """Place of the storage service that is the chain's head."""
    return place.routing.routing.head(chain) // 1000 - 1


def test_a_read_goes_on_at_another_replica_at_once_when_a_service_dies() -> None:
    async def test() -> None:
        async with world(nodes=3) as place:
            for index in range(30):
                place.chunks[chunk_id(9, index)] = bytearray(b"x" * 100)
            await place.client.storage.read([reading(place, chunk_id(9, index)) for index in range(30)])
            place.scopes[0].cancel()
            began = time.monotonic()
            done = await place.client.storage.read([reading(place, chunk_id(9, index)) for index in range(30)])
            assert time.monotonic() - began < 0.5
            assert all(bytes(result.view) == b"x" * 100 for result in done)
            assert place.client.counters.read_failovers > 0
            # And from now on it is not asked first, so nothing fails.
            before = place.client.counters.read_failovers
            await place.client.storage.read([reading(place, chunk_id(9, index)) for index in range(30)])
            assert place.client.counters.read_failovers == before

    run(test)


@pytest.mark.parametrize("error", [TargetNotServing("no"), ChainVersionMismatch("no"), InputOutput("the disk died")])
def test_a_replica_that_refuses_is_passed_over_and_routing_refreshed(error: Exception) -> None:
    async def test() -> None:
        async with world(nodes=2) as place:
            place.chunks[ID] = bytearray(b"x" * 100)
            for storage in place.storage:
                storage.fail_reads = error  # type: ignore[assignment]
                [done] = await place.client.storage.read([reading(place)])
                assert bytes(done.view) == b"x" * 100
                storage.fail_reads = None
            await trio.sleep(0.01)
            assert place.client.counters.read_failovers >= 1
            assert place.routing.refreshes == (0 if isinstance(error, InputOutput) else 1)

    run(test)


@pytest.mark.parametrize("shared_memory", [True, False])
def test_bytes_that_fail_their_checksum_are_read_from_another_replica(shared_memory: bool) -> None:
    async def test() -> None:
        async with world(nodes=2, shared_memory=shared_memory) as place:
            place.chunks[ID] = bytearray(range(100))
            place.storage[0].corrupt = place.storage[1].corrupt = True
            with pytest.raises(ChecksumMismatch):  # soon, not at the deadline
                await place.client.storage.read([reading(place)])
            assert place.client.counters.checksum_mismatches == 6
            for wrong in (0, 1):
                place.storage[wrong].corrupt, place.storage[1 - wrong].corrupt = True, False
                [done] = await place.client.storage.read([reading(place)])
                assert bytes(done.view) == bytes(range(100))

    run(test)


def test_a_replica_that_hangs_is_left_and_cannot_spoil_what_another_gave() -> None:
    async def test() -> None:
        async with world(nodes=2, config=ClientConfig(buffer_pool_bytes=32 << 20, read_attempt_s=0.1)) as place:
            for index in range(4):
                place.chunks[chunk_id(9, index)] = bytearray(b"x" * 100)
            place.storage[0].silent = True
            reads = [reading(place, chunk_id(9, index)) for index in range(4)]
            began = time.monotonic()
            done = await place.client.storage.read(reads)
            assert time.monotonic() - began < 0.5
            assert all(bytes(result.view) == b"x" * 100 for result in done)
            moved = [result.moved for result in done]
            assert any(moved)
            assert not all(moved)
            place.meta.make(9, length=4 * CHUNK)
            file = place.client.open_file(place.meta.copy(9))
            assert bytes(await file.pread(0, 100)) == b"x" * 100  # over the file layer too
            await file.close()

    run(test)


def test_a_reply_that_lacks_bytes_is_not_taken_for_a_hole() -> None:
    async def test() -> None:
        async with world(nodes=2) as place:
            place.chunks[ID] = bytearray(b"x" * 100)
            for storage in place.storage:
                storage.cut_reply = True
            with pytest.raises(InputOutput):
                await place.client.storage.read([reading(place)])
            place.storage[1].cut_reply = False
            [done] = await place.client.storage.read([reading(place)])
            assert bytes(done.view) == b"x" * 100

    run(test)


def test_bytes_that_change_in_the_callers_memory_are_refused_soon() -> None:
    async def test() -> None:
        async with world(nodes=1) as place:
            place.storage[0].mangle = True
            with pytest.raises(ChecksumMismatch):
                await place.client.storage.write([writing(b"abc")])
            assert len(place.storage[0].writes) == 4
            assert ID not in place.chunks

    run(test)


def test_all_replicas_failing_for_good_is_an_error_at_once() -> None:
    async def test() -> None:
        async with world(nodes=2) as place:
            for storage in place.storage:
                storage.fail_reads = InputOutput("dead disk")
            began = time.monotonic()
            with pytest.raises(InputOutput):
                await place.client.storage.read([reading(place)])
            assert time.monotonic() - began < 0.5

    run(test)


def test_a_chain_without_serving_targets_is_waited_for_until_the_deadline() -> None:
    async def test() -> None:
        async with world(nodes=1) as place:
            place.chunks[ID] = bytearray(b"x" * 100)
            [member] = place.routing.message.chains[0].targets
            member.state = cluster_pb2.LASTSRV
            place.routing.update()
            with pytest.raises(DeadlineExceeded) as caught:
                await place.client.storage.read([reading(place)], deadline_s=0.2)
            assert isinstance(caught.value.__cause__, NoServingTarget)

            def back() -> None:
                if place.routing.refreshes > 8:
                    member.state = cluster_pb2.SERVING
                    place.routing.update()

            place.routing.on_refresh = back
            [done] = await place.client.storage.read([reading(place)])
            assert bytes(done.view) == b"x" * 100

    run(test)


def test_a_batch_is_one_request_a_node() -> None:
    async def test() -> None:
        async with world(nodes=2, chains=4) as place:
            reads = []
            for index in range(100):
                place.chunks[chunk_id(9, index)] = bytearray(b"%03d" % index)
                reads.append(reading(place, chunk_id(9, index), 3, chain=index % 4 + 1))
            done = await place.client.storage.read(reads)
            assert [bytes(result.view) for result in done] == [b"%03d" % index for index in range(100)]
            assert [len(storage.reads) for storage in place.storage] == [1, 1]
            await place.client.storage.write([writing(b"y", chain=index % 4 + 1, chunk=chunk_id(8, index)) for index in range(100)])
            assert [len(storage.writes) for storage in place.storage] == [1, 1]

    run(test)


@pytest.mark.parametrize("error", [ChainVersionMismatch("old"), NotChainHead("no"), TargetNotServing("no"), ChecksumMismatch("bits flipped")])
def test_a_refused_write_is_sent_again_with_its_tag_over_newer_routing(error: Exception) -> None:
    async def test() -> None:
        async with world(nodes=2) as place:
            head = place.storage[head_of(place)]
            head.fail_writes = [error, error]  # type: ignore[list-item]
            await place.client.storage.write([writing(b"abc")])
            tags = [io.tag for request in head.writes for io in request.writes]
            assert len(tags) == 3
            assert tags[0] == tags[1] == tags[2]
            assert place.routing.refreshes == 2
            assert place.chunks[ID] == b"abc"

    run(test)


def test_what_hangs_at_a_service_goes_on_as_soon_as_that_is_out_of_its_chains() -> None:
    """Not only when its attempt, of 2 to 6 s, is over."""

    async def test() -> None:
        async with world(nodes=3) as place:
            for index in range(6):
                place.chunks[chunk_id(9, index)] = bytearray(b"x" * 100)
            storage, dying = place.client.storage, head_of(place)
            place.storage[dying].silent = True
            ended: list[str] = []
            reads = [reading(place, chunk_id(9, index)) for index in range(6)]

            async def act(name: str, what: Callable[[], Awaitable[object]]) -> None:
                await what()
                ended.append(name)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(act, "write", lambda: storage.write([writing(b"abc", chunk=chunk_id(8, 0))]))
                nursery.start_soon(act, "read", lambda: storage.read(reads))
                nursery.start_soon(act, "sync", lambda: storage.sync([1, 2]))
                await trio.sleep(0.3)
                assert not ended
                began = time.monotonic()
                place.head_only(dying)
            assert sorted(ended) == ["read", "sync", "write"]
            assert time.monotonic() - began < 1
            assert place.chunks[chunk_id(8, 0)] == b"abc"

    run(test)


def test_a_write_whose_answer_was_lost_is_applied_once() -> None:
    async def test() -> None:
        async with world(nodes=2, config=ClientConfig(buffer_pool_bytes=32 << 20, write_attempt_s=0.2)) as place:
            dying = head_of(place)
            place.storage[dying].forget_reply = 1
            for other in place.storage:  # what was applied is known along the chain
                other.tags = place.storage[dying].tags

            def changed() -> None:
                if place.routing.refreshes == 1:
                    place.head_only(dying)

            place.routing.on_refresh = changed
            await place.client.storage.write([writing(b"abc")])
            assert sum(storage.applied for storage in place.storage) == 1
            assert place.storage[1 - dying].writes[-1].writes[0].chain_version == 2

    run(test)


def test_no_space_is_an_error_at_once_and_others_of_the_batch_are_written() -> None:
    async def test() -> None:
        async with world(nodes=2, chains=2) as place:
            head = place.storage[head_of(place)]
            head.fail_writes = [NoSpace("full")]
            outcomes = await place.client.storage.write_each([writing(b"a", chain=1), writing(b"b", chain=2, chunk=chunk_id(9, 1))])
            assert isinstance(outcomes[0], NoSpace)
            assert place.chunks[chunk_id(9, 1)] == b"b"
            assert ID not in place.chunks

    run(test)


def test_writing_gives_up_at_the_deadline() -> None:
    async def test() -> None:
        async with world(nodes=1, config=ClientConfig(buffer_pool_bytes=32 << 20, write_attempt_s=0.05)) as place:
            place.storage[0].silent = True
            began = time.monotonic()
            with pytest.raises(DeadlineExceeded):
                await place.client.storage.write([writing(b"abc")], deadline_s=0.4)
            assert 0.1 < time.monotonic() - began < 1
            assert len({io.tag.sequence for request in place.storage[0].writes for io in request.writes}) == 1

    run(test)


def test_the_same_over_tcp() -> None:
    async def test() -> None:
        async with world(nodes=2, shared_memory=False) as place:
            data = bytes(range(256)) * 200
            await place.client.storage.write([writing(data)])
            [done] = await place.client.storage.read([reading(place, length=CHUNK)])
            assert bytes(done.view[: done.length]) == data
            place.scopes[head_of(place)].cancel()
            [done] = await place.client.storage.read([reading(place, length=CHUNK)])
            assert bytes(done.view[: done.length]) == data

    run(test)
