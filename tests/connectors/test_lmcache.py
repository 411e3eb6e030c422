"""LMCache on kvfs: the calls of its remote backend, with chunks and headers compared and every reference counted."""

from __future__ import annotations

import asyncio
import importlib.util
import math
import random
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from kvfs.common.errors import InvalidArgument

_spec = importlib.util.find_spec("lmcache")
if _spec is not None and _spec.origin is not None:  # the fake one is a bare folder
    pytest.skip("LMCache itself is here: tests/ecosystem runs it", allow_module_level=True)

from lmcache.v1.protocol import MemoryFormat  # noqa: E402

from kvfs.kvcache.connectors.lmcache import KvfsAdapter, KvfsConnector  # noqa: E402

if TYPE_CHECKING:
    from tests.cluster.conftest import RealCluster

pytestmark = pytest.mark.cluster

TOKENS, SHAPE = 16, (1, 4, 16, 576)
FULL = 2 * math.prod(SHAPE)


class Key:
    def __init__(self, number: int, worker: int = 0) -> None:
        self.number, self.worker = number, worker

    def to_string(self) -> str:
        return f"deepseek-ai/DeepSeek-V3@2@{self.worker}@{self.number:x}@bfloat16"


class Chunk:
    """A memory object: the caller's reference is one."""

    def __init__(self, shapes: Any, dtypes: Any, fmt: Any) -> None:
        self.shapes, self.dtypes, self.fmt, self.references = shapes, dtypes, fmt, 1
        self.byte_array: Any = memoryview(bytearray(sum(2 * math.prod(shape) for shape in shapes)))

    def get_shapes(self) -> Any:
        return self.shapes

    def get_dtypes(self) -> Any:
        return self.dtypes

    def get_memory_format(self) -> Any:
        return self.fmt

    def ref_count_up(self) -> None:
        self.references += 1

    def ref_count_down(self) -> None:
        self.references -= 1


class Memory:
    """LMCache's local memory: counts what it gave out, and may have none."""

    def __init__(self, config: Any, metadata: Any) -> None:
        self.config, self.metadata = config, metadata
        self.given: list[Chunk] = []
        self.room = 1000

    def allocate(self, shapes: Any, dtypes: Any, fmt: Any) -> Chunk | None:
        if len(self.given) >= self.room:
            return None
        self.given.append(Chunk(shapes, dtypes, fmt))
        return self.given[-1]

    @property
    def held(self) -> int:
        return sum(chunk.references for chunk in self.given)


def chunk(number: int, tokens: int = TOKENS) -> Chunk:
    made = Chunk([(1, 4, tokens, 576)], ["bfloat16"], MemoryFormat.KV_MLA_FMT)
    made.byte_array[:] = random.Random(number).randbytes(len(made.byte_array))
    return made


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    """LMCache's loop, in its own thread."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield loop
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


Run = Callable[[Any], Any]


@pytest.fixture
def run(loop: asyncio.AbstractEventLoop) -> Run:
    return lambda coroutine: asyncio.run_coroutine_threadsafe(coroutine, loop).result(20)


@pytest.fixture
def connect(loop: asyncio.AbstractEventLoop, settings: dict[str, Any], run: Run) -> Iterator[Callable[..., tuple[KvfsConnector, Memory]]]:
    made: list[KvfsConnector] = []

    def make(**extra: Any) -> tuple[KvfsConnector, Memory]:
        own = {
            "kvfs_cluster": settings["cluster"],
            "kvfs_space": settings["space"],
            "remote_storage_plugin.kvfs.class_name": "KvfsConnector",
            **extra,
        }
        shapes = {"get_shapes": lambda: [SHAPE], "get_dtypes": lambda: ["bfloat16"]}
        metadata = SimpleNamespace(model_name="deepseek-ai/DeepSeek-V3", world_size=2, chunk_size=TOKENS, **shapes)
        config = SimpleNamespace(extra_config=own, remote_serde="naive")
        memory = Memory(config, metadata)
        made.append(KvfsConnector(loop=loop, local_cpu_backend=memory, config=config))
        return made[-1], memory

    yield make
    for each in made:
        run(each.close())


@pytest.mark.parametrize("header", [True, False])
def test_chunks_come_back_as_they_were(connect: Any, run: Run, header: bool) -> None:
    """Also those that are no full chunk, and each for its own worker."""
    connector, memory = connect(save_chunk_meta=header)
    keys = [Key(0), Key(1), Key(2), Key(0, worker=1)]
    chunks = [chunk(0), chunk(1), chunk(2, tokens=5), chunk(3)]
    assert not run(connector.exists(keys[0])) and run(connector.get(keys[0])) is None and memory.held == 0
    run(connector.put(keys[0], chunks[0]))
    run(connector.batched_put(keys[1:], chunks[1:]))
    assert [each.references for each in chunks] == [1] * 4, "the caller's reference and nobody else's"
    assert connector.exists_sync(keys[0]) and run(connector.exists(keys[3]))
    found = run(connector.batched_get([keys[2], Key(9), keys[0], keys[3]]))
    assert found[1] is None
    for got, put in zip([found[0], found[2], found[3]], [chunks[2], chunks[0], chunks[3]], strict=True):
        assert bytes(got.byte_array) == bytes(put.byte_array)
        assert not header or (got.get_shapes(), got.get_memory_format()) == ([put.shapes[0]], MemoryFormat.KV_MLA_FMT)
    assert memory.held == 3
    run(connector.put(keys[0], chunk(77)))
    assert bytes(run(connector.get(keys[0])).byte_array) == bytes(chunks[0].byte_array), "the first writer wins"


def test_prefixes(connect: Any, run: Run) -> None:
    connector, memory = connect()
    keys = [Key(number) for number in range(6)]
    run(connector.batched_put([*keys[:3], *keys[4:]], [chunk(number) for number in (0, 1, 2, 4, 5)]))
    assert connector.batched_contains(keys) == run(connector.batched_async_contains("l", keys)) == 3
    found = run(connector.batched_get_non_blocking("l", keys))
    assert len(found) == memory.held == 3, "what lies behind the gap was given back"
    assert connector.remove_sync(keys[1]) and run(connector.batched_async_contains("l", keys)) == 1


def test_memory_that_is_short_or_wrong_sizes_are_misses(connect: Any, run: Run) -> None:
    for header in (True, False):
        connector, memory = connect(save_chunk_meta=header)
        key = Key(100 + header)
        run(connector.put(key, chunk(0)))
        memory.room = 0
        assert run(connector.get(key)) is None
        memory.room = 1000
        run(connector.put(Key(8), chunk(1, tokens=TOKENS + 1)))
        assert not connector.exists_sync(Key(8)), "larger than a full chunk"
        assert run(connector.get(key)) is not None and memory.held == 1


def test_a_caller_who_gives_up_leaks_nothing_and_spoils_nothing(connect: Any, run: Run, loop: asyncio.AbstractEventLoop) -> None:
    connector, memory = connect()
    keys, chunks = [Key(number) for number in range(40)], [chunk(number) for number in range(40)]
    giving = asyncio.run_coroutine_threadsafe(connector.batched_put(keys, chunks), loop)
    giving.cancel()
    wait_until(lambda: all(each.references == 1 for each in chunks))
    run(connector.batched_put(keys, chunks))

    async def give_up(after_s: float) -> None:
        taking = asyncio.create_task(connector.batched_get(keys))
        await asyncio.sleep(after_s)
        taking.cancel()
        try:
            for each in await taking:
                each.ref_count_down()
        except asyncio.CancelledError:
            pass

    for step in range(12):
        run(give_up(step / 1000))
    wait_until(lambda: memory.held == 0)
    got = run(connector.batched_get(keys))
    assert [bytes(each.byte_array) for each in got] == [bytes(each.byte_array) for each in chunks]


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_the_loop_goes_on_while_chunks_are_stored(connect: Any, run: Run, loop: asyncio.AbstractEventLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    connector, _ = connect()
    keys = [Key(number) for number in range(8)]
    storing_now = threading.Event()
    put = connector._space.put

    def slow_put(*arguments: Any) -> Any:
        storing_now.wait(10)
        return put(*arguments)

    monkeypatch.setattr(connector._space, "put", slow_put)
    storing = asyncio.run_coroutine_threadsafe(connector.batched_put(keys, [chunk(number) for number in range(8)]), loop)
    for _ in range(100):
        run(asyncio.sleep(0))
    assert not storing.done()
    asking = asyncio.run_coroutine_threadsafe(connector.exists(keys[-1]), loop)
    storing_now.set()
    assert asking.result(10), "whoever asks waits for the put that was begun"
    storing.result(10)
    assert connector.batched_contains(keys) == 8 and not connector._storing


def test_the_scheduler_s_role_needs_the_adapter(connect: Any, loop: asyncio.AbstractEventLoop, run: Run) -> None:
    worker, memory = connect()
    run(worker.put(Key(1), chunk(1)))
    with pytest.raises(InvalidArgument, match="KvfsAdapter"):
        KvfsConnector(loop=loop, local_cpu_backend=None, config=memory.config)
    adapter = KvfsAdapter()
    assert adapter.can_parse("plugin://kvfs") and adapter.can_parse("plugin://kvfs.second") and not adapter.can_parse("redis://host")
    scheduler = adapter.create_connector(SimpleNamespace(loop=loop, local_cpu_backend=None, config=memory.config, metadata=memory.metadata))
    assert scheduler.exists_sync(Key(1)) and not scheduler.exists_sync(Key(2))
    run(scheduler.close())


def test_names_are_not_kept_and_settings_are_checked(connect: Any, run: Run) -> None:
    connector, _ = connect()
    with pytest.raises(NotImplementedError, match="digests"):
        run(connector.list())
    with pytest.raises(InvalidArgument, match="no setting 'clutser'"):
        connect(kvfs_clutser="x")


def test_services_that_are_gone_are_misses(new_services: RealCluster, settings: dict[str, Any], connect: Any, run: Run) -> None:
    connector, memory = connect(kvfs_cluster=str(new_services.path), kvfs_get_timeout=1, kvfs_put_timeout=1)
    run(connector.put(Key(1), chunk(1)))
    for name in ("storage-1", "storage-2"):
        new_services.kvfs("stop", name)
    start_s = time.monotonic()
    run(connector.put(Key(2), chunk(2)))
    assert run(connector.get(Key(1))) is None and not run(connector.exists(Key(1))) and connector.batched_contains([Key(1)]) == 0
    assert memory.held == 0 and time.monotonic() - start_s < 8
