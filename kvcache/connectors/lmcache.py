"""LMCache (0.5.6) on kvfs: a remote connector plugin.

    remote_storage_plugins: ["kvfs"]
    extra_config:
      remote_storage_plugin.kvfs.module_path: kvfs.kvcache.connectors.lmcache
      remote_storage_plugin.kvfs.class_name: KvfsConnector
      kvfs_cluster: ...

Owns the form of a chunk in a space: LMCache's own header where `save_chunk_meta` asks for it, then the chunk. Invariants:
  - one chunk is one block, all workers of one model and chunk size share a space, and the block's key is the digest of LMCache's whole key;
  - the loop's thread never waits for storage: what is asynchronous runs in threads of the connector;
  - a chunk whose put was begun here is found here: LMCache does not wait for its puts, so that whoever asks for such a chunk waits for its put;
  - memory that is being sent is held until it is sent, and memory that was read for a caller who has gone is given back;
  - trouble with storage is a miss, or a chunk not stored, and a line in the log.
LMCache calls from the thread of one asyncio loop and from its own threads.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any, TypeVar

from kvfs.common.errors import InvalidArgument
from kvfs.kvcache.connectors.common import Connection, Settings, block_key, engine_class, log

PREFIX = "kvfs_"
"""Of our settings in LMCache's extra_config."""
THREADS = 8
T = TypeVar("T")

if TYPE_CHECKING:

    class RemoteConnector:
        """What is used of LMCache's abstract class."""

        save_chunk_meta: bool
        meta_shapes: Any
        meta_dtypes: Any
        meta_fmt: Any
        full_chunk_size_bytes: int
        remote_metadata_bytes: int

        def __init__(self, config: Any, metadata: Any) -> None: ...
        def reshape_partial_chunk(self, memory_obj: Any, bytes_read: int) -> Any: ...

    class ConnectorAdapter:
        def __init__(self, schema: str = "") -> None: ...

else:
    RemoteConnector = engine_class("lmcache.v1.storage_backend.connector.base_connector", "RemoteConnector")
    ConnectorAdapter = engine_class("lmcache.v1.storage_backend.connector", "ConnectorAdapter")


class KvfsConnector(RemoteConnector):
    """Built by LMCache as `cls(loop=, local_cpu_backend=, config=)`."""

    def __init__(self, loop: asyncio.AbstractEventLoop, local_cpu_backend: Any, config: Any = None, metadata: Any = None) -> None:
        if local_cpu_backend is None and metadata is None:
            raise InvalidArgument("LMCache names no model to a connector in the scheduler's role: set class_name to KvfsAdapter")
        config = config if config is not None else local_cpu_backend.config
        metadata = metadata if metadata is not None else local_cpu_backend.metadata
        super().__init__(config, metadata)
        self.loop = loop
        self.local_cpu_backend = local_cpu_backend
        extra = config.extra_config or {}
        settings = Settings.read({name.removeprefix(PREFIX): value for name, value in extra.items() if name.startswith(PREFIX)})
        self._header_bytes = self.remote_metadata_bytes if self.save_chunk_meta else 0
        self._connection = Connection(settings, "lmcache")
        self._space = self._connection.space(
            metadata.model_name,
            f"w{metadata.world_size}.c{metadata.chunk_size}",
            block_tokens=metadata.chunk_size,
            block_bytes=self._chunk_bytes(metadata) + self._header_bytes,
            dtype=",".join(str(dtype).removeprefix("torch.") for dtype in self.meta_dtypes),
            layout=getattr(self.meta_fmt, "name", str(self.meta_fmt)),
            extra={
                "shapes": ";".join("x".join(map(str, shape)) for shape in self.meta_shapes),
                "workers": str(metadata.world_size),
                "header": str(self._header_bytes),
                "serde": str(getattr(config, "remote_serde", "") or ""),
            },
        )
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="kvfs-lmcache")
        self._storing: dict[bytes, Future[None]] = {}
        """Puts under way, by key. Tasks begin in the order in which they came, so who waits here never keeps a put from beginning."""
        log.info("LMCache's chunks are kept in /kvcache/%s", self._space.name)

    def _chunk_bytes(self, metadata: Any) -> int:
        """The largest chunk: LMCache says its shape twice, and where the two differ (as in its own check) chunks of the larger one come."""
        elements: int = sum(math.prod(shape) for shape in self.meta_shapes)
        told: int = math.prod(getattr(metadata, "kv_shape", None) or (0,))
        return self.full_chunk_size_bytes * max(told, elements) // elements

    # --- is it there --------------------------------------------------------------------------------------------------------------------------

    def exists_sync(self, key: Any) -> bool:
        return self._space.exists(self._settled([key]))[0]

    async def exists(self, key: Any) -> bool:
        return await self._in_thread(self.exists_sync, key)

    def support_batched_contains(self) -> bool:
        return True

    def batched_contains(self, keys: Sequence[Any]) -> int:
        """How many chunks are there from the first on. They count as used."""
        return self._space.match(self._settled(keys))

    def support_batched_async_contains(self) -> bool:
        return True

    async def batched_async_contains(self, lookup_id: str, keys: Sequence[Any], pin: bool = False) -> int:
        return await self._in_thread(self.batched_contains, keys)

    # --- get ------------------------------------------------------------------------------------------------------------------------------------

    async def get(self, key: Any) -> Any:
        return (await self.batched_get([key]))[0]

    def support_batched_get(self) -> bool:
        return True

    async def batched_get(self, keys: Sequence[Any]) -> list[Any]:
        """Memory objects with the chunks, None for a miss or where there is no memory."""
        loading = self._threads.submit(self._load, keys)
        try:
            return await asyncio.wrap_future(loading)
        except asyncio.CancelledError:
            loading.add_done_callback(_give_back)
            raise

    def support_batched_get_non_blocking(self) -> bool:
        return True

    async def batched_get_non_blocking(self, lookup_id: str, keys: Sequence[Any]) -> list[Any]:
        """The chunks up to the first miss."""
        found = await self.batched_get(keys)
        end = found.index(None) if None in found else len(found)
        _release(found[end:])
        return found[:end]

    def _load(self, names: Sequence[Any]) -> list[Any]:
        found: list[Any] = [None] * len(names)
        try:
            keys = self._settled(names)
            if self.save_chunk_meta:
                self._space.get_staged(keys, lambda place, block: found.__setitem__(place, self._unpack(block)))
            else:
                self._load_bare(keys, found)
        except BaseException:
            _release(found)
            raise
        return found

    def _unpack(self, block: memoryview) -> Any:
        """A memory object with what a block holds: header, chunk."""
        from lmcache.v1.protocol import RemoteMetadata

        header = RemoteMetadata.deserialize(bytes(block[: self._header_bytes]))
        content = block[self._header_bytes :]
        memory = self.local_cpu_backend.allocate(header.shapes, header.dtypes, header.fmt)
        if memory is None:
            return None
        view = _view(memory)
        if len(view) < len(content) or header.length != len(content):
            log.warning("a chunk of %d bytes does not fit the %d that its header asks for: a miss", len(content), len(view))
            _release([memory])
            return None
        view[: len(content)] = content
        return memory

    def _load_bare(self, keys: list[bytes], found: list[Any]) -> None:
        """Chunks without a header go straight into memory for a full one, which is cut to what came."""
        for place in range(len(keys)):
            found[place] = self.local_cpu_backend.allocate(self.meta_shapes, self.meta_dtypes, self.meta_fmt)
        places = [place for place, memory in enumerate(found) if memory is not None]
        lengths = self._space.get_whole([keys[place] for place in places], [_view(found[place]) for place in places])
        for place, length in zip(places, lengths, strict=True):
            memory = found[place]
            try:
                found[place] = None if length is None else self.reshape_partial_chunk(memory, length)
            except ValueError as error:  # not whole tokens
                log.warning("a chunk of %s bytes is a miss: %s", length, error)
                found[place] = None
            if found[place] is None:
                _release([memory])

    # --- put ------------------------------------------------------------------------------------------------------------------------------------

    async def put(self, key: Any, memory_obj: Any) -> None:
        await self.batched_put([key], [memory_obj])

    def support_batched_put(self) -> bool:
        return True

    async def batched_put(self, keys: Sequence[Any], memory_objs: Sequence[Any]) -> None:
        """Store chunks, in the order of their prompt. The caller keeps its references; ours lasts until the bytes are sent, even if he gives up."""
        blocks = _keys(keys)
        for memory in memory_objs:
            memory.ref_count_up()
        try:
            storing = self._threads.submit(self._store, blocks, list(memory_objs))
        except BaseException:
            _release(memory_objs)
            raise
        self._storing.update(dict.fromkeys(blocks, storing))

        def stored(_: Future[None]) -> None:
            for block in blocks:
                if self._storing.get(block) is storing:
                    self._storing.pop(block, None)
            _release(memory_objs)

        storing.add_done_callback(stored)
        await asyncio.wrap_future(storing)

    def _store(self, keys: list[bytes], memory_objs: list[Any]) -> None:
        blocks = [self._pack(memory) for memory in memory_objs]
        fitting = [place for place, pieces in enumerate(blocks) if sum(map(len, pieces)) <= self._space.block_bytes]
        if len(fitting) < len(blocks):
            log.warning("%d chunks are larger than a full one and are not stored", len(blocks) - len(fitting))
        self._space.put([keys[place] for place in fitting], [blocks[place] for place in fitting])

    def _pack(self, memory: Any) -> list[bytes | memoryview]:
        view = _view(memory)
        if not self.save_chunk_meta:
            return [view]
        from lmcache.v1.protocol import RemoteMetadata

        return [RemoteMetadata(len(view), memory.get_shapes(), memory.get_dtypes(), memory.get_memory_format()).serialize(), view]

    # --- the rest -------------------------------------------------------------------------------------------------------------------------------

    def remove_sync(self, key: Any) -> bool:
        return self._space.remove(self._settled([key]))[0]

    async def close(self) -> None:
        await self._in_thread(self._close)
        self._threads.shutdown(wait=False)

    def _close(self) -> None:
        self._space.close()
        self._connection.close()

    def _settled(self, names: Sequence[Any]) -> list[bytes]:
        """The keys of chunks, when puts of them that were begun here are over."""
        keys = _keys(names)
        if self._storing:
            wait([storing for key in keys if (storing := self._storing.get(key)) is not None])
        return keys

    async def _in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.wrap_future(self._threads.submit(function, *arguments))

    async def list(self) -> list[str]:
        raise NotImplementedError("kvfs keeps digests of keys, not their names: `kvfs kv stat` says how many chunks there are")


class KvfsAdapter(ConnectorAdapter):
    """The same by way of LMCache's adapters, which also say the model in the scheduler's role."""

    def __init__(self) -> None:
        super().__init__("plugin://kvfs")

    def create_connector(self, context: Any) -> KvfsConnector:
        return KvfsConnector(context.loop, context.local_cpu_backend, context.config, context.metadata)


def _keys(keys: Sequence[Any]) -> list[bytes]:
    return [block_key(key.to_string()) for key in keys]


def _view(memory: Any) -> memoryview:
    return memoryview(memory.byte_array).cast("B")


def _release(memory_objs: Sequence[Any]) -> None:
    for memory in memory_objs:
        if memory is not None:
            memory.ref_count_down()


def _give_back(loading: Future[list[Any]]) -> None:
    if not loading.cancelled() and loading.exception() is None:
        _release(loading.result())
