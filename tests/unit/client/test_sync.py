"""The synchronous face over a real cluster that runs in a thread of the test."""

from __future__ import annotations

import errno
import gc
import io
import os
import random
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from tests.unit.client.whole import whole_in_thread

from kvfs.client import Client, ClientConfig
from kvfs.client.locate import ClusterAddress
from kvfs.common.errors import ConfigError

CONFIG = ClientConfig(buffer_pool_bytes=64 << 20)


@pytest.fixture(scope="module")
def cluster() -> Iterator[ClusterAddress]:
    with whole_in_thread() as address:
        yield address


@pytest.fixture
def client(cluster: ClusterAddress) -> Iterator[Client]:
    with Client(",".join(cluster.managers), config=CONFIG) as made:
        yield made


def test_python_files_work_unchanged(client: Client) -> None:
    with client.open("/text", "w", encoding="utf-8") as file:
        file.writelines(f"line {number} ü\n" for number in range(5000))
    with client.open("/text", encoding="utf-8") as file:
        assert [line.rstrip("\n") for line in file] == [f"line {number} ü" for number in range(5000)]
        file.seek(0)
        assert file.readline() == "line 0 ü\n"
    with client.open("/text", "a") as file:
        file.write("end")
    assert client.read_bytes("/text").endswith(b"end")
    with client.open("/text", "r+b") as file:
        assert isinstance(file, io.BufferedRandom)
        assert file.read(4) == b"line"
        file.write(b"=")
        file.seek(-3, os.SEEK_END)
        assert file.read() == b"end"
        file.truncate(10)
    assert client.read_bytes("/text") == b"line=0 \xc3\xbc\n"
    with pytest.raises(FileExistsError):
        client.open("/text", "x")
    with client.open("/raw", "wb", buffering=0) as raw:
        assert raw.write(b"abc") == 3
        assert raw.tell() == 3
        with pytest.raises(io.UnsupportedOperation):
            raw.read(1)
    with pytest.raises(ValueError, match="closed"):
        raw.write(b"x")
    client.unlink("/text")
    client.unlink("/raw")


def test_random_reads_and_writes_through_a_buffered_and_a_raw_file(client: Client) -> None:
    rng = random.Random(4)
    model = bytearray(rng.randbytes(3 << 20))
    client.write_bytes("/model", model)
    for buffering in (-1, 0):
        with client.open("/model", "r+b", buffering=buffering) as file:
            for _ in range(150):
                offset, size = rng.randrange(len(model)), rng.choice([1, 100, 5000, 200_000])
                file.seek(offset)
                if rng.random() < 0.4:
                    data = rng.randbytes(size)[: len(model) - offset]
                    assert file.write(data) == len(data)
                    model[offset : offset + len(data)] = data
                else:
                    assert file.read(size) == model[offset : offset + size]
        assert client.read_bytes("/model") == model
    client.unlink("/model")


def test_sequential_reading_in_small_steps_borrows_what_was_read_ahead(client: Client) -> None:
    data = random.Random(5).randbytes(9 << 20)
    client.write_bytes("/long", data)
    with client.open("/long", "rb", buffering=0) as raw:
        parts = []
        while part := raw.read(100_000):
            parts.append(part)
        assert b"".join(parts) == data
    with client.open("/long", "rb") as file:
        assert file.read() == data
    client.unlink("/long")


def test_a_thread_reads_by_itself_where_the_storage_is_here(client: Client) -> None:
    data = random.Random(15).randbytes((20 << 20) + 777)
    client.write_bytes("/here", data)
    before = client.counters.read_requests
    with client.open("/here", "rb", buffering=0) as raw:
        view = memoryview(bytearray(1 << 20))
        parts = []
        while count := raw.readinto(view):
            parts.append(bytes(view[:count]))
        assert b"".join(parts) == data
        raw.seek(0)
        assert raw.read(3 << 20) == data[: 3 << 20]
        assert raw.read() == data[3 << 20 :]
        rng = random.Random(16)
        for _ in range(200):
            offset, size = rng.randrange(len(data) + 1000), rng.choice([1, 4096, 100_000, 300_000, 2 << 20])
            raw.seek(offset)
            assert raw.read(size) == data[offset : offset + size]
            got = raw.pread(size, offset)
            assert got.readonly and bytes(got) == data[offset : offset + size]
            one, other = bytearray(size), bytearray(17)
            assert raw.preadv([one], offset) == len(data[offset : offset + size])
            assert one.startswith(data[offset : offset + size])
            assert raw.preadv([other, one], offset) == len(data[offset : offset + size + 17])
            assert (other + one).startswith(data[offset : offset + size + 17])
    assert client.counters.read_requests == before, "not a byte came through the service"
    assert client.counters.direct_bytes > 60 << 20
    with pytest.raises(ValueError, match="closed"):
        raw.readinto(view)
    with client.open("/here", "ab", buffering=0) as raw, pytest.raises(io.UnsupportedOperation):
        raw.readinto(view)
    client.unlink("/here")


def test_what_comes_next_is_asked_for_before_it_is_needed(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvfs.client.file.places.STALE_S", 60)
    data = random.Random(17).randbytes(1 << 20) * 30
    client.write_bytes("/next", data)
    with client.open("/next", "rb", buffering=0) as raw:
        view = memoryview(bytearray(1 << 20))
        waits = 0
        call = raw._call

        def counted(function: Any, *arguments: Any) -> Any:
            nonlocal waits
            waits += 1
            return call(function, *arguments)

        raw._call = counted
        for number in range(30):
            assert raw.readinto(view) == 1 << 20 and view == data[number << 20 : number + 1 << 20]
            time.sleep(0.005)
    assert waits <= 2, "the first question, and perhaps one that a busy machine was late with"
    client.unlink("/next")


def test_random_small_reads_fetch_what_they_ask_for(client: Client) -> None:
    """A reader that jumps about must not make the cluster read megabytes for each of its few bytes."""
    data = os.urandom(8 << 20)
    client.write_bytes("/jumps", data)
    before = client.counters.read_bytes
    offsets = [((number * 2_654_435_761) % (8 << 20)) // 4096 * 4096 for number in range(1, 31)]
    view = bytearray(4096)
    with client.open("/jumps", "rb", buffering=0) as file:
        for offset in offsets:
            file.seek(offset)
            assert file.readinto(view) == 4096 and view == data[offset : offset + 4096]
    assert client.counters.read_bytes - before <= 30 * 64 * 1024


def test_a_reader_sees_its_own_files_writes_at_once(client: Client) -> None:
    with client.open("/own", "w+b", buffering=0) as raw:
        raw.write(b"a" * 100_000)
        raw.seek(0)
        assert raw.read(10) == b"a" * 10
        raw.seek(5)
        raw.write(b"b")
        raw.seek(0)
        assert raw.read(10) == b"aaaaabaaaa"
        raw.truncate(7)
        raw.seek(0)
        assert raw.read(100) == b"aaaaaba"
    client.unlink("/own")


def test_a_reader_sees_another_handles_write_though_it_has_borrowed_the_bytes(client: Client) -> None:
    client.write_bytes("/two", b"a" * 300_000)
    with client.open("/two", "rb", buffering=0) as reader, client.open("/two", "r+b", buffering=0) as writer:
        assert reader.read(10) == b"a" * 10
        writer.seek(10)
        writer.write(b"b" * 10)
        assert reader.read(20) == b"b" * 10 + b"a" * 10
    client.unlink("/two")


def test_a_file_that_is_forgotten_is_closed(client: Client) -> None:
    file = client.open("/forgotten", "wb", buffering=0)
    file.write(b"kept")
    del file
    gc.collect()
    assert client.read_bytes("/forgotten") == b"kept"
    # Collected in the client's own thread, it must not wait for itself.
    file = client.open("/forgotten", "ab")
    file.write(b"!")

    async def collect(_: object) -> None:
        file.close()

    client.call(collect)
    for _ in range(200):  # nobody waited for it
        if client.read_bytes("/forgotten") == b"kept!":
            break
        time.sleep(0.02)
    assert client.read_bytes("/forgotten") == b"kept!"
    client.unlink("/forgotten")


def test_errors_are_oserrors_with_the_path(client: Client) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        client.stat("/nowhere/at/all")
    assert caught.value.filename == "/nowhere/at/all"
    client.makedirs("/dir/sub", exist_ok=True)
    with pytest.raises(IsADirectoryError):
        client.open("/dir", "rb")
    with pytest.raises(OSError, match="/dir") as not_empty:
        client.rmdir("/dir")
    assert not_empty.value.errno == errno.ENOTEMPTY
    assert [(name, inode.type) for name, inode in client.scandir("/dir")] == [("sub", 2)]
    assert list(client.walk("/dir")) == [("/dir", ["sub"], []), ("/dir/sub", [], [])]
    client.rmtree("/dir")
    assert not client.exists("/dir")


def test_many_threads(client: Client) -> None:
    client.mkdir("/threads")
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            rng = random.Random(number)
            for turn in range(5):
                data = rng.randbytes(rng.randrange(1, 300_000))
                path = f"/threads/{number}-{turn}"
                client.write_bytes(path, data)
                assert client.read_bytes(path) == data
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(client.listdir("/threads")) == 40
    client.rmtree("/threads")


def test_registered_memory(client: Client) -> None:
    with client.register(2 << 20) as buffer, client.open("/spans", "w+b", buffering=0) as raw:
        buffer.view[: 1 << 20] = b"z" * (1 << 20)
        assert raw.pwrite(buffer.span(0, 1 << 20), 100) == 1 << 20
        assert raw.preadv([buffer.span(1 << 20, 1 << 20)], 0) == 1 << 20
        assert buffer.view[1 << 20 : 2 << 20] == bytes(100) + b"z" * ((1 << 20) - 100)
    client.unlink("/spans")


def test_a_forked_child_has_its_own_connection(client: Client) -> None:
    client.write_bytes("/forked", b"before the fork")
    opened = client.open("/forked", "rb", buffering=0)
    assert opened.read(6) == b"before"
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            answer = opened.read(4) + b"|" + client.read_bytes("/forked")
            client.write_bytes("/by-child", b"hello")
            client.close()
        except BaseException as error:
            answer = repr(error).encode()
        os.write(writer, answer)
        os._exit(0)
    os.close(writer)
    answer = b""
    while part := os.read(reader, 4096):
        answer += part
    os.close(reader)
    os.waitpid(pid, 0)
    assert answer == b" the|before the fork"
    assert client.read_bytes("/by-child") == b"hello"
    assert opened.read(4) == b" the"
    opened.close()
    client.unlink("/forked")
    client.unlink("/by-child")


def test_a_forked_child_does_not_write_into_its_parents_memory(client: Client) -> None:
    block = random.Random(3).randbytes(300_000)
    file = client.open("/forked", "wb", buffering=0)
    for _ in range(3):
        file.write(block)
    pid = os.fork()
    if pid == 0:
        try:
            file.write(b"#" * 1000)
            client.close()
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    file.write(block)
    file.close()
    assert client.read_bytes("/forked") == block * 4
    client.unlink("/forked")


def test_a_sequential_writer_crosses_to_the_clients_thread_once_for_several_mib(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    data = random.Random(6).randbytes(24 << 20)
    crossings: list[str] = []
    call = client.portal.call
    monkeypatch.setattr(client.portal, "call", lambda function, *arguments: crossings.append(function.__name__) or call(function, *arguments))
    with client.open("/stream", "wb", buffering=0) as file:
        at = 0
        while at < len(data):
            at += file.write(data[at : at + 100_000])
        assert file.tell() == len(data)
        assert client.stat("/stream").length == len(data)
    assert len(crossings) < 20
    assert client.read_bytes("/stream") == data
    client.unlink("/stream")


def test_writers_readers_flushes_and_truncates_of_one_file_in_many_threads(client: Client) -> None:
    """Four writers stream into their parts, again and again; one thread reads what they have finished, one flushes, one cuts and grows the end."""
    part, rounds = 3 << 20, 4
    client.write_bytes("/busy", b"")
    finished = [0] * 4
    stop = threading.Event()
    errors: list[BaseException] = []

    def content(number: int, turn: int) -> bytes:
        return bytes([16 * number + turn + 1]) * part

    def guarded(work: Any) -> Any:
        def body() -> None:
            try:
                work()
            except BaseException as error:
                errors.append(error)

        return body

    def writer(number: int) -> Any:
        def body() -> None:
            dice = random.Random(number)
            with client.open("/busy", "r+b", buffering=0) as file:
                for turn in range(rounds):
                    data, at = content(number, turn), 0
                    file.seek(number * part)
                    while at < part:
                        at += file.write(data[at : at + dice.choice([10, 4096, 70_000, 1 << 20])])
                    assert bytes(file.pread(part, number * part)) == data
                    finished[number] = turn + 1

        return body

    def reader() -> None:
        with client.open("/busy", "rb", buffering=0) as file:
            while not stop.is_set():
                for number in range(4):
                    turn = finished[number]
                    seen = bytes(file.pread(1000, number * part + part - 1000))
                    assert not turn or (len(seen) == 1000 and min(seen) >= 16 * number + turn), (number, turn, seen[:1])

    def disturber() -> None:
        with client.open("/busy", "r+b", buffering=0) as file:
            while not stop.wait(0.01):
                file.flush()
                file.truncate(4 * part + 5000)
                file.fsync()

    threads = [threading.Thread(target=guarded(writer(number))) for number in range(4)]
    others = [threading.Thread(target=guarded(work)) for work in (reader, disturber)]
    for thread in (*threads, *others):
        thread.start()
    for thread in threads:
        thread.join(60)
    stop.set()
    for thread in others:
        thread.join(60)
    assert not errors, errors
    assert client.read_bytes("/busy")[: 4 * part] == b"".join(content(number, rounds - 1) for number in range(4))
    client.unlink("/busy")


def test_a_closed_client_refuses_and_keeps_what_was_written(cluster: ClusterAddress) -> None:
    client = Client(",".join(cluster.managers), config=CONFIG)
    file = client.open("/left-open", "wb", buffering=0)
    file.write(b"not lost")
    client.close()
    client.close()
    with pytest.raises(OSError, match="closed"):
        client.stat("/")
    with pytest.raises(OSError, match="closed"):
        file.write(b"x")
    with Client(",".join(cluster.managers), config=CONFIG) as again:
        assert again.read_bytes("/left-open") == b"not lost"
        again.unlink("/left-open")


def test_settings_come_from_the_environment(cluster: ClusterAddress, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVFS_CLUSTER", ",".join(cluster.managers))
    monkeypatch.setenv("KVFS_CLIENT__BUFFER_POOL_BYTES", str(32 << 20))
    with Client() as client:
        assert client.portal.client.pool.total_bytes == 32 << 20
    monkeypatch.setenv("KVFS_CLIENT__BUFER_POOL_BYTES", "1")
    with pytest.raises(ConfigError, match="buffer_pool_bytes"):
        Client().connect()


def test_no_cluster_is_a_clear_error() -> None:
    with pytest.raises(OSError, match=r"127\.0\.0\.1"):
        Client("127.0.0.1:1", config=ClientConfig(deadline_s=0.3)).connect()


def test_holes_are_punched(client: Client, cluster: ClusterAddress) -> None:
    """Whole chunks go, with what is still buffered of them; others see it; the length and the rest stay."""
    data = random.Random(3).randbytes(5_000_000)
    with client.open_raw("/punched", os.O_RDWR | os.O_CREAT) as file:
        chunk = client.stat("/punched").layout.chunk_size
        file.pwrite(data, 0)
        file.punch(chunk, 3 * chunk)
        expected = data[:chunk] + bytes(2 * chunk) + data[3 * chunk :]
        assert bytes(file.pread(len(data), 0)) == expected
        for start, end in ((1, chunk), (0, chunk + 1), (2 * chunk, chunk)):
            with pytest.raises(OSError) as refused:
                file.punch(start, end)
            assert refused.value.errno == errno.EINVAL
        file.punch(64 * chunk, 65 * chunk)
        file.punch(4 * chunk, 8 * chunk)
        expected = expected[: 4 * chunk] + bytes(len(data) - 4 * chunk)
        with Client(cluster, config=CONFIG) as other, other.open_raw("/punched", os.O_RDONLY) as its:
            assert other.stat("/punched").length == len(data)
            assert bytes(its.pread(len(data), 0)) == expected
            file.pwrite(b"again", chunk + 5)
            file.fsync()
            assert bytes(its.pread(12, chunk)) == bytes(5) + b"again" + bytes(2)
            with pytest.raises(io.UnsupportedOperation):
                its.punch(0, chunk)
    with client.open_raw("/punched", os.O_RDONLY) as file:
        assert file.length == len(data)
