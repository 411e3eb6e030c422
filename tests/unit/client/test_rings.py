"""I/O rings over real services: order, ends of files, holes, depth, threads, what is given up."""

from __future__ import annotations

import ctypes
import errno
import os
import random
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import trio
from tests.unit.client.whole import whole_in_thread

from kvfs.client import Client, ClientConfig, RawFile, User
from kvfs.client.locate import ClusterAddress
from kvfs.client.rings import IoRing
from kvfs.client.storage_reads import ChunkRead
from kvfs.common.errors import InputOutput

KIB = 1 << 10
MIB = 1 << 20
PAGE = 300 * KIB
RDWR = os.O_RDWR | os.O_CREAT


@pytest.fixture(scope="module")
def cluster() -> Iterator[ClusterAddress]:
    with whole_in_thread() as address:
        yield address


@pytest.fixture
def client(cluster: ClusterAddress) -> Iterator[Client]:
    with Client(cluster, config=ClientConfig(buffer_pool_bytes=64 * MIB, deadline_s=10)) as made:
        yield made


@pytest.fixture
def file(client: Client, request: pytest.FixtureRequest) -> Iterator[RawFile]:
    with client.open_raw(f"/{request.node.name}", RDWR) as opened:
        yield opened


def written(file: RawFile, length: int, seed: int = 1) -> bytes:
    data = random.Random(seed).randbytes(length)
    file.pwrite(data, 0)
    file.fsync()
    return data


def results(ring: IoRing, count: int) -> list[int]:
    return [done.result for done in ring.submit().wait(min_results=count, timeout=20)]


def no_places(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the storage were on another machine: reads go to the service."""

    async def places(ranges: list[Any]) -> list[None]:
        return [None] * len(ranges)

    monkeypatch.setattr(client.portal.client.storage, "places", places)


@pytest.fixture(params=["here", "service"])
def way(request: pytest.FixtureRequest, client: Client, monkeypatch: pytest.MonkeyPatch) -> str:
    """How reads go."""
    if request.param == "service":
        no_places(client, monkeypatch)
    return str(request.param)


def broken(client: Client, monkeypatch: pytest.MonkeyPatch, replacement: Any) -> Any:
    """Reads of this client go to the service, and through `replacement(real, reads)`."""
    no_places(client, monkeypatch)
    storage = client.portal.client.storage
    real = storage.read_each

    async def read_each(reads: list[ChunkRead], **options: Any) -> Any:
        return await replacement(real, reads)

    monkeypatch.setattr(storage, "read_each", read_each)
    return real


@pytest.mark.parametrize("kind", ["plain", "registered"])
def test_pages_written_and_read_by_rings(client: Client, file: RawFile, way: str, kind: str) -> None:
    """Pages that straddle chunks, in an order that is not the file's; the results name what was prepared, in that order."""
    buffer = client.register(9 * PAGE)
    view = memoryview(bytearray(9 * PAGE)) if kind == "plain" else buffer.view
    data = random.Random(7).randbytes(9 * PAGE)
    view[:] = data
    order = [5, 0, 8, 3, 1, 7, 2, 6, 4]
    writer = client.make_ring(16, for_read=False)
    for page in order:
        writer.prepare(view[page * PAGE : (page + 1) * PAGE], file, page * PAGE, userdata=page)
    done = writer.submit().wait(min_results=9, timeout=20)
    assert [(each.result, each.userdata) for each in done] == [(PAGE, page) for page in order]
    assert file.length == 9 * PAGE
    view[:] = bytes(9 * PAGE)
    reader = client.make_ring(16)
    for page in order:
        reader.prepare(view[page * PAGE : (page + 1) * PAGE], file, page * PAGE, userdata=page)
    done = reader.submit().wait(min_results=9, timeout=20)
    assert [(each.result, each.userdata) for each in done] == [(PAGE, page) for page in order]
    assert bytes(view) == data


def test_whole_pages_of_registered_memory_are_read_without_a_copy(client: Client, file: RawFile, monkeypatch: pytest.MonkeyPatch) -> None:
    no_places(client, monkeypatch)
    data = written(file, 4 * MIB)
    buffer = client.register(4 * MIB)
    before = client.counters.heap_blocks, client.portal.client.pool.free_bytes
    least = [before[1]]
    real = client.portal.client.pool.allocate
    client.portal.client.pool.allocate = lambda size: (least.append(-1), real(size))[1]  # type: ignore[method-assign]
    ring = client.make_ring(4)
    for start in range(0, 4 * MIB, MIB):
        ring.prepare(buffer.span(start, MIB), file, start)
    assert results(ring, 4) == [MIB] * 4
    assert bytes(buffer.view) == data
    assert -1 not in least and client.counters.heap_blocks == before[0]


def test_reads_on_this_machine_ask_for_places_only(client: Client, file: RawFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of checksum units at both ends; the storage reads nothing. What has gone from its place meanwhile is asked of the service."""
    data = written(file, 3 * MIB)
    before = client.counters.read_requests, client.counters.direct_bytes
    buffer = bytearray(2 * MIB + 3)
    ring = client.make_ring(1)
    ring.prepare(buffer, file, 77_777)
    assert results(ring, 1) == [len(buffer)] and buffer == data[77_777 : 77_777 + len(buffer)]
    assert client.counters.read_requests == before[0] and client.counters.direct_bytes == before[1] + len(buffer)
    storage = client.portal.client.storage
    real = storage.places

    async def moved(ranges: list[Any]) -> Any:
        return [place and place._replace(checksums=b"\0" * len(place.checksums)) for place in await real(ranges)]

    monkeypatch.setattr(storage, "places", moved)
    buffer[:] = bytes(len(buffer))
    ring.prepare(buffer, file, 77_777)
    assert results(ring, 1) == [len(buffer)] and buffer == data[77_777 : 77_777 + len(buffer)]
    assert client.counters.read_requests > before[0]


def test_short_only_at_the_end_of_the_file(client: Client, file: RawFile, way: str) -> None:
    data = written(file, MIB + 5)
    ring = client.make_ring(4)
    buffers = [bytearray(b"x" * MIB) for _ in range(4)]
    for buffer, offset in zip(buffers, (0, MIB - 10, MIB + 5, 5 * MIB), strict=True):
        ring.prepare(buffer, file, offset)
    assert results(ring, 4) == [MIB, 15, 0, 0]
    assert bytes(buffers[0]) == data[:MIB] and bytes(buffers[1][:15]) == data[-15:]
    assert buffers[1][15:] == b"x" * (MIB - 15), "what is behind the end is left alone"


def test_holes_are_zeros_unless_forbidden(client: Client, file: RawFile, way: str) -> None:
    """A chunk that was never written, and a chunk that is shorter than the file says."""
    chunk = client.stat(file.name).layout.chunk_size
    file.pwrite(b"a" * 1000, 0)
    file.truncate(3 * chunk)
    file.pwrite(b"b" * 1000, 2 * chunk)
    file.fsync()
    offsets = (0, 500, chunk + 7, 2 * chunk)
    for forbid in (False, True):
        ring = client.make_ring(4, forbid_holes=forbid)
        buffers = [bytearray(b"x" * 1000) for _ in offsets]
        for buffer, offset in zip(buffers, offsets, strict=True):
            ring.prepare(buffer, file, offset)
        if forbid:
            assert results(ring, 4) == [1000, -errno.ENODATA, -errno.ENODATA, 1000]
        else:
            assert results(ring, 4) == [1000] * 4
            assert buffers == [b"a" * 1000, b"a" * 500 + bytes(500), bytes(1000), b"b" * 1000]


def test_a_read_sees_what_was_written_before_it(client: Client, cluster: ClusterAddress, file: RawFile, way: str) -> None:
    """By this client and not yet sent, by a ring of another client and not yet reported, over what was read before."""
    written(file, MIB)
    reader = client.make_ring(1)
    buffer = bytearray(1000)
    reader.prepare(buffer, file, 100)
    assert results(reader, 1) == [1000]
    file.pwrite(b"mine" * 250, 100)
    reader.prepare(buffer, file, 100)
    assert results(reader, 1) == [1000] and buffer == b"mine" * 250
    with Client(cluster) as other, other.open_raw(file.name, os.O_WRONLY) as its:
        for turn in range(20):
            writer = other.make_ring(1, for_read=False)
            writer.prepare(bytes([turn]) * 1000, its, 100)
            assert results(writer, 1) == [1000]
            reader.prepare(buffer, file, 100)
            assert results(reader, 1) == [1000] and buffer == bytes([turn]) * 1000


def test_a_closed_file_has_the_length_that_was_written(client: Client, cluster: ClusterAddress) -> None:
    """Closing waits for what is under way, and tells the length."""
    file = client.open_raw("/closing", RDWR)
    ring = client.make_ring(8, for_read=False)
    for page in range(8):
        ring.prepare(bytes([page]) * PAGE, file, page * PAGE)
    ring.submit()
    while not ring.wait(max_results=1):
        pass  # all have begun
    file.close()
    assert [done.result for done in ring.wait(min_results=7, timeout=10)] == [PAGE] * 7
    with Client(cluster) as other:
        assert other.read_bytes("/closing") == b"".join(bytes([page]) * PAGE for page in range(8))


@pytest.mark.parametrize("kind", ["plain", "registered", "scattered"])
def test_adjacent_writes_go_together(client: Client, file: RawFile, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Eight pages of 300 KiB that follow each other lie on three chunks: one update each. Registered memory that does not follow each other is not
    copied for it, and what overlaps or leaves a gap is not taken for adjacent."""
    storage = client.portal.client.storage
    updates: list[int] = []
    real = storage.write_each

    async def count(writes: Any, **options: Any) -> Any:
        updates.append(len(writes))
        return await real(writes, **options)

    monkeypatch.setattr(storage, "write_each", count)
    data = random.Random(3).randbytes(8 * PAGE)
    buffer = client.register(8 * PAGE)
    memory = memoryview(bytearray(8 * PAGE)) if kind == "plain" else buffer.view
    order = list(range(8))
    if kind == "scattered":
        random.Random(1).shuffle(order)
    ring = client.make_ring(8, for_read=False)
    for page in order:
        place = order.index(page) if kind == "scattered" else page
        memory[place * PAGE : (place + 1) * PAGE] = data[page * PAGE : (page + 1) * PAGE]
        ring.prepare(memory[place * PAGE : (place + 1) * PAGE], file, page * PAGE, userdata=page)
    done = ring.submit().wait(min_results=8, timeout=20)
    assert [(each.result, each.userdata) for each in done] == [(PAGE, page) for page in order]
    assert len(updates) == 1 and (updates[0] > 8 if kind == "scattered" else updates == [3])
    assert file.pread(8 * PAGE, 0) == data
    updates.clear()
    for start, byte in ((0, b"a"), (900, b"b"), (2001, b"c")):
        ring.prepare(byte * 1000, file, start)
    assert results(ring, 3) == [1000] * 3 and updates == [3]
    found = bytes(file.pread(3001, 0))
    assert found[:900] == b"a" * 900 and found[1000:1900] == b"b" * 900 and found[1900:2001] == data[1900:2001] and found[2001:] == b"c" * 1000


def test_bounded_depth(client: Client, file: RawFile) -> None:
    written(file, 10)
    ring = client.make_ring(2)
    ring.prepare(bytearray(4), file, 0).prepare(bytearray(4), file, 4)
    for _ in range(2):
        with pytest.raises(OSError) as refused:
            ring.prepare(bytearray(4), file, 0)
        assert refused.value.errno == errno.EAGAIN
        ring.submit()  # submitted is not waited for
    assert [done.result for done in ring.wait(min_results=1)] == [4]
    ring.prepare(bytearray(4), file, 8)
    assert results(ring, 2) == [4, 2]
    assert ring.wait() == [] and ring.wait(min_results=1, timeout=0.01) == []


def test_wait_counts(client: Client, file: RawFile) -> None:
    written(file, 100)
    ring = client.make_ring(8)
    for offset in range(6):
        ring.prepare(bytearray(1), file, offset, userdata=offset)
    ring.submit()
    assert [done.userdata for done in ring.wait(min_results=2)] == [0, 1], "max_results 0: no more than min_results"
    while ring.outstanding and ring._ready(8) < 4:
        time.sleep(0.001)
    assert [done.userdata for done in ring.wait()] == [2], "neither: one"
    assert [done.userdata for done in ring.wait(max_results=8)] == [3, 4, 5]


def test_batches_of_a_fixed_depth(client: Client, file: RawFile, monkeypatch: pytest.MonkeyPatch) -> None:
    written(file, 100)
    calls: list[int] = []

    async def count(real: Any, reads: list[ChunkRead]) -> Any:
        calls.append(len(reads))
        return await real(reads)

    broken(client, monkeypatch, count)
    ring = client.make_ring(16, io_depth=3)
    for offset in range(7):
        ring.prepare(bytearray(1), file, offset)
    assert results(ring, 6) == [1] * 6
    assert calls == [3, 3]
    assert ring.wait(min_results=1, timeout=0.05) == [], "the seventh waits for two more"
    ring.prepare(bytearray(1), file, 0).prepare(bytearray(1), file, 0)
    assert results(ring, 3) == [1] * 3 and calls == [3, 3, 3]
    calls.clear()
    ring = client.make_ring(16, io_depth=-3)
    for offset in range(7):
        ring.prepare(bytearray(1), file, offset)
    assert results(ring, 7) == [1] * 7 and sorted(calls) == [1, 3, 3]
    calls.clear()
    ring = client.make_ring(16, io_depth=3, timeout_s=0.02)
    ring.prepare(bytearray(1), file, 0)
    assert results(ring, 1) == [1] and calls == [1], "not longer than the timeout"


def test_one_error_is_one_result(client: Client, file: RawFile, monkeypatch: pytest.MonkeyPatch) -> None:
    data = written(file, 8 * PAGE)

    async def lose_third(real: Any, reads: list[ChunkRead]) -> Any:
        outcomes = await real(reads)
        outcomes[2] = InputOutput("lost")
        return outcomes

    broken(client, monkeypatch, lose_third)
    ring = client.make_ring(8)
    buffers = [bytearray(100) for _ in range(5)]
    for index, buffer in enumerate(buffers):
        ring.prepare(buffer, file, index * PAGE)
    assert results(ring, 5) == [100, 100, -errno.EIO, 100, 100]
    assert [bytes(buffers[index]) for index in (0, 1, 3, 4)] == [data[index * PAGE : index * PAGE + 100] for index in (0, 1, 3, 4)]


@pytest.mark.parametrize("kind", ["plain", "registered"])
def test_what_is_retired_touches_nothing_any_more(client: Client, file: RawFile, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Four reads, of which the storage answers none in time; two are given up. The other two go on, and the next results are theirs."""
    data = written(file, MIB)
    asked = threading.Event()
    stuck = [True]

    async def hang(real: Any, reads: list[ChunkRead]) -> Any:
        asked.set()
        while stuck[0]:
            await trio.sleep(0.01)
        return await real(reads)

    broken(client, monkeypatch, hang)
    ring = client.make_ring(8)
    buffer = client.register(64 * KIB)
    view = memoryview(bytearray(64 * KIB)) if kind == "plain" else buffer.view
    for page in range(4):
        ring.prepare(view[page * 16 * KIB : (page + 1) * 16 * KIB], file, page * 16 * KIB, userdata=page)
    ring.submit()
    assert asked.wait(5)
    assert ring.wait(min_results=2, timeout=0.05) == []
    gone = ring.retire(2)
    assert [(done.result, done.userdata) for done in gone] == [(-errno.ETIMEDOUT, 0), (-errno.ETIMEDOUT, 1)]
    view[: 32 * KIB] = b"n" * (32 * KIB)
    stuck[0] = False
    assert [(done.result, done.userdata) for done in ring.wait(min_results=2, timeout=5)] == [(16 * KIB, 2), (16 * KIB, 3)]
    assert bytes(view[32 * KIB :]) == data[32 * KIB : 64 * KIB]
    assert view[: 32 * KIB] == b"n" * (32 * KIB)
    assert ring.retire(5) == []


def test_prepared_and_retired_before_it_began(client: Client, file: RawFile) -> None:
    written(file, 10)
    ring = client.make_ring(2)
    ring.prepare(bytearray(4), file, 0, userdata="never submitted")
    assert [(done.result, done.userdata) for done in ring.retire(1)] == [(-errno.ETIMEDOUT, "never submitted")]
    ring.prepare(bytearray(4), file, 0, userdata="next")
    assert [done.userdata for done in ring.submit().wait(min_results=1)] == ["next"]


def test_a_preparing_and_a_waiting_thread(client: Client, file: RawFile) -> None:
    data = written(file, 500 * 4 * KIB)
    ring = client.make_ring(16)
    found: list[tuple[int, bytes]] = []

    def collect() -> None:
        while len(found) < 500:
            found.extend((done.userdata, bytes(done.buffer)) for done in ring.wait(min_results=1, max_results=7, timeout=20))

    thread = threading.Thread(target=collect)
    thread.start()
    for index in range(500):
        while True:
            try:
                ring.prepare(bytearray(4 * KIB), file, index * 4 * KIB, userdata=index)
                break
            except OSError as full:
                assert full.errno == errno.EAGAIN
                ring.submit()
                time.sleep(0.0005)
    ring.submit()
    thread.join(30)
    assert [index for index, _ in found] == list(range(500))
    assert b"".join(content for _, content in found) == data


def test_sixteen_rings_side_by_side(client: Client, file: RawFile) -> None:
    """As SGLang's jobs: each thread has a ring for reads and one for writes, with 8 entries, over one file."""
    written(file, 16 * 8 * 64 * KIB)
    failures: list[BaseException] = []

    def job(number: int) -> None:
        try:
            memory = bytearray(8 * 64 * KIB)
            view = memoryview(memory)
            writer, reader = client.make_ring(8, for_read=False), client.make_ring(8)
            for turn in range(3):
                content = random.Random(100 * number + turn).randbytes(len(memory))
                view[:] = content
                places = [(page * 16 + number) * 64 * KIB for page in range(8)]
                for page, place in enumerate(places):
                    writer.prepare(view[page * 64 * KIB : (page + 1) * 64 * KIB], file, place)
                assert results(writer, 8) == [64 * KIB] * 8
                view[:] = bytes(len(memory))
                for page, place in enumerate(places):
                    reader.prepare(view[page * 64 * KIB : (page + 1) * 64 * KIB], file, place)
                assert results(reader, 8) == [64 * KIB] * 8
                assert memory == content
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=job, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures


def test_wrong_arguments(client: Client, file: RawFile) -> None:
    reader, writer = client.make_ring(4), client.make_ring(4, for_read=False)
    with client.open_raw(file.name, os.O_RDONLY) as read_only, client.open_raw(file.name, os.O_WRONLY | os.O_APPEND) as appending:
        cases = [
            (errno.EINVAL, lambda: reader.prepare(bytearray(0), file, 0)),
            (errno.EINVAL, lambda: reader.prepare(bytearray(4), file, -1)),
            (errno.EINVAL, lambda: reader.prepare(b"four", file, 0)),
            (errno.EINVAL, lambda: reader.prepare(memoryview(bytearray(8))[::2], file, 0)),
            (errno.EBADF, lambda: writer.prepare(b"four", read_only, 0)),
            (errno.EBADF, lambda: writer.prepare(b"four", appending, 0)),
            (errno.EBADF, lambda: reader.prepare(bytearray(4), appending, 0)),
            (errno.EINVAL, lambda: client.make_ring(0)),
            (errno.EINVAL, lambda: client.make_ring(4, io_depth=5)),
            (errno.EINVAL, lambda: client.make_ring(4, timeout_s=-1)),
        ]
        for number, call in cases:
            with pytest.raises(OSError) as refused:
                call()
            assert refused.value.errno == number
    with pytest.raises(OSError) as closed:
        reader.prepare(bytearray(4), read_only, 0)
    assert closed.value.errno == errno.EBADF
    assert reader.outstanding == writer.outstanding == 0
    writer.prepare(b"x", file, (1 << 63) - 1)
    assert results(writer, 1) == [-errno.EFBIG]


def test_the_end_of_the_client_ends_what_is_under_way(cluster: ClusterAddress) -> None:
    client = Client(cluster)
    file = client.open_raw("/ending", RDWR)
    ring = client.make_ring(4)
    ring.prepare(bytearray(4), file, 0)
    waited: list[int] = []
    thread = threading.Thread(target=lambda: waited.extend(done.result for done in ring.wait(min_results=1)))
    thread.start()
    client.close()
    thread.join(10)
    assert waited == [-errno.EBADF]
    with pytest.raises(OSError):
        ring.submit()


def test_a_ring_after_a_fork(client: Client, file: RawFile) -> None:
    data = written(file, 1000)
    ring = client.make_ring(2)
    ring.prepare(bytearray(10), file, 0)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            buffer = bytearray(1000)
            ring.prepare(buffer, file, 0).prepare(bytearray(5), file, 0)
            status = 0 if results(ring, 2) == [1000, 5] and buffer == data else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert results(ring, 1) == [10]


def test_open_by_number_checks_rights(client: Client, file: RawFile) -> None:
    number = client.stat(file.name).inode
    with client.open_inode(number, os.O_RDONLY) as again:
        assert again.readable() and not again.writable()
    client.chmod(file.name, 0o600)
    with pytest.raises(PermissionError):
        client.open_inode(number, os.O_RDONLY, user=User(12345, 12345))
    with pytest.raises(OSError) as gone:
        client.open_inode(1 << 40, os.O_RDONLY)
    assert gone.value.errno == errno.ESTALE


def test_a_service_that_hangs_loses_registered_memory(client: Client, file: RawFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a service may still write into is taken from it; the bytes read are there all the same."""
    data = written(file, 64 * KIB)
    spans: list[Any] = []

    async def pin_first(real: Any, reads: list[ChunkRead]) -> Any:
        outcomes = await real(reads)
        spans.append(reads[0].into)
        reads[0].into.pin()  # type: ignore[union-attr]
        return outcomes

    broken(client, monkeypatch, pin_first)
    buffer = client.register(64 * KIB)
    ring = client.make_ring(1)
    ring.prepare(buffer.span(), file, 0)
    assert results(ring, 1) == [64 * KIB]
    mapped = memoryview(bytearray(64 * KIB))
    os.preadv(buffer.region.fd or -1, [mapped], 0)
    view = (ctypes.c_ubyte * (64 * KIB)).from_address(buffer.address)
    assert bytes(view) == data
    os.pwrite(buffer.region.fd or -1, b"late", 0)
    assert bytes(view) == data, "what the service writes now is seen by nobody"
    spans[0].unpin()
