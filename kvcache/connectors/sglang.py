"""SGLang's HiCache (0.5.23) on kvfs: a dynamic storage backend.

    --hicache-storage-backend dynamic --hicache-storage-backend-extra-config
    '{"backend_name":"kvfs","module_path":"kvfs.kvcache.connectors.sglang","class_name":"KvfsHiCacheStorage","interface_v1":1,"cluster":"..."}'

Owns the mapping of host pools to spaces and of pages to blocks. Invariants:
  - one page of one pool is one block: the concatenation of the page's buffers, in the order in which the pool names them;
  - a space holds the pages of one model, pool, type, layout and page size of one rank; tensor-parallel ranks share it only where SGLang says
    that they hold the same bytes (MLA) and has one of them write for all;
  - with `interface_v1` pages are read into and written from the pool's own memory;
  - a method never raises for trouble with storage (an exception would end SGLang's backup thread): get and exists miss, set says False.
SGLang calls exists, get and set from a thread each.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from kvfs.kvcache.connectors.common import Connection, EngineSpace, Pieces, Settings, block_key, engine_class, log, memory_at

ENGINE_KEYS = {
    "backend_name",
    "module_path",
    "class_name",
    "interface_v1",
    "prefetch_threshold",
    "prefetch_timeout_base",
    "prefetch_timeout_per_ki_token",
    "hicache_storage_pass_prefix_keys",
    "tp_lcm_size",
}
"""Of the extra config, SGLang's own."""
KV = "kv"
MODULE = "sglang.srt.mem_cache.hicache_storage"

if TYPE_CHECKING:

    class HiCacheStorage:
        """What is used of SGLang's abstract class."""

        def register_mem_pool_host(self, mem_pool_host: Any) -> None: ...
        def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: Any) -> None: ...

else:
    HiCacheStorage = engine_class(MODULE, "HiCacheStorage")


class _Pool:
    """A host pool and where its pages lie: in one space, or, split by heads among the ranks of a wider engine, in one for each of those ranks."""

    def __init__(self, host_pool: Any, spaces: list[EngineSpace], split: int) -> None:
        self.host_pool = host_pool
        self.spaces = spaces
        self.page_tokens = _page_tokens(host_pool)
        self._split = split
        self.page_bytes = sum(space.block_bytes for space in spaces)

    def pieces(self, keys: Sequence[str], host_indices: Any) -> list[list[Pieces]]:
        """For each space, the memory of each page."""
        if len(host_indices) != len(keys) * self.page_tokens:
            raise ValueError(f"{len(host_indices)} host indices for {len(keys)} pages of {self.page_tokens} tokens")
        addresses, sizes = _buffers(self.host_pool, host_indices, self._split)
        views = [memory_at(address, size) for address, size in zip(addresses, sizes, strict=True)]
        blocks = len(keys) * len(self.spaces)
        each = len(views) // blocks
        found: list[Pieces] = [views[start : start + each] for start in range(0, len(views), each)]
        return [found[shard :: len(self.spaces)] for shard in range(len(self.spaces))]


def _page_tokens(host_pool: Any) -> int:
    return getattr(host_pool, "page_size", 1) or 1


def _buffers(host_pool: Any, host_indices: Any, split: int) -> tuple[list[int], list[int]]:
    if split > 1:
        addresses, sizes = host_pool.get_split_heads_page_buffer_meta(host_indices, split)
    else:
        addresses, sizes = host_pool.get_page_buffer_meta(host_indices)
    return list(addresses), list(sizes)


def _first_page(tokens: int) -> Any:
    """Host indices of a pool's first page, to ask how large a page is."""
    try:
        import torch
    except ModuleNotFoundError:
        from array import array

        return array("q", bytes(8 * tokens))
    return torch.zeros(tokens, dtype=torch.int64)


class KvfsHiCacheStorage(HiCacheStorage):
    """Built by SGLang's StorageBackendFactory, once in each scheduler process."""

    def __init__(self, storage_config: Any, kwargs: Any = None) -> None:
        extra = dict(storage_config.extra_config or {})
        self._config = storage_config
        self._zero_copy = bool(extra.get("interface_v1"))
        settings = Settings.read({name: value for name, value in extra.items() if name not in ENGINE_KEYS})
        self._connection = Connection(settings, "sglang")
        self._pools: dict[str, _Pool] = {}
        self._logical = False
        self._stats: dict[str, list[float]] = {"prefetch_pgs": [], "backup_pgs": [], "prefetch_bandwidth": [], "backup_bandwidth": []}

    # --- pools -------------------------------------------------------------------------------------------------------------------------------

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        super().register_mem_pool_host(mem_pool_host)
        # The anchor of hybrid models only owns indices; all data lies in pools that are registered after it.
        self._logical = getattr(mem_pool_host, "kv_buffer", None) is None
        if not self._logical:
            self._register(KV, mem_pool_host)

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: Any) -> None:
        super().register_mem_host_pool_v2(host_pool, host_pool_name)
        if str(host_pool_name) != KV:  # the anchor is registered already
            self._register(str(host_pool_name), host_pool)

    def on_host_pools_registered(self) -> None:
        """Nothing is left to do: a pool's space is open when register has returned."""

    def _register(self, name: str, host_pool: Any) -> None:
        config = self._config
        ranks = [(config.tp_rank, config.tp_size)]
        split = 1
        if name == KV and config.should_split_heads:
            split = config.tp_lcm_size // config.tp_size
            ranks = [(config.tp_rank * split + part, config.tp_lcm_size) for part in range(split)]
        tokens = _page_tokens(host_pool)
        _, sizes = _buffers(host_pool, _first_page(tokens), split)
        layout = str(getattr(host_pool, "layout", ""))
        shared = config.is_mla_model and not _rank_sharded(name, host_pool)
        spaces = [
            self._connection.space(
                config.model_name or "model",
                f"{name}.{layout}" + ("" if shared else f".tp{rank}of{size}"),
                block_tokens=tokens,
                block_bytes=sum(sizes) // len(ranks),
                dtype=str(getattr(host_pool, "dtype", "")).removeprefix("torch."),
                layout=layout,
                extra={
                    "pool": name,
                    "pages": "buffers" if self._zero_copy else "flat",
                    "pp": f"{config.pp_rank}/{config.pp_size}",
                    "cp": f"{config.attn_cp_rank}/{config.attn_cp_size}",
                    **({} if shared else {"tp": f"{rank}/{size}"}),
                },
            )
            for rank, size in ranks
        ]
        self._pools[name] = _Pool(host_pool, spaces, split)
        log.info("SGLang's pool %s is kept in %s", name, ", ".join(f"/kvcache/{space.name}" for space in spaces))

    # --- zero copy ---------------------------------------------------------------------------------------------------------------------------

    def batch_exists(self, keys: list[str], extra_info: Any = None) -> int:
        """How many pages are there from the first on."""
        if self._logical:
            return len(keys)
        blocks, prefix = _keys(keys), _prefix(extra_info)
        found = len(keys)
        for space in self._pools[KV].spaces:
            found = min(found, space.match(blocks[:found], prefix)) if found else 0
        return found

    def batch_get_v1(self, keys: list[str], host_indices: Any, extra_info: Any = None) -> list[bool]:
        return [True] * len(keys) if self._logical else self._read(KV, keys, host_indices)

    def batch_set_v1(self, keys: list[str], host_indices: Any, extra_info: Any = None) -> list[bool]:
        return [True] * len(keys) if self._logical else self._write(KV, keys, host_indices, extra_info)

    def _read(self, name: str, keys: list[str], host_indices: Any) -> list[bool]:
        return self._move("prefetch", name, keys, host_indices, lambda space, blocks, pages: space.get(blocks, pages))

    def _write(self, name: str, keys: list[str], host_indices: Any, extra_info: Any) -> list[bool]:
        prefix = _prefix(extra_info)
        return self._move("backup", name, keys, host_indices, lambda space, blocks, pages: space.put(blocks, pages, prefix))

    def _move(
        self, what: str, name: str, keys: list[str], host_indices: Any, move: Callable[[EngineSpace, list[bytes], list[Pieces]], list[bool]]
    ) -> list[bool]:
        """`move` the pages of a pool between its memory and its spaces; a page is there when every space has its part."""
        pool = self._pools.get(name)
        if pool is None or not keys:
            return [False] * len(keys)
        try:
            shards = pool.pieces(keys, host_indices)
        except Exception:
            log.exception("SGLang's pool %s does not say where its pages lie: nothing of it is read or stored", name)
            return [False] * len(keys)
        start_s = time.perf_counter()
        blocks = _keys(keys)
        there = [True] * len(keys)
        for space, pages in zip(pool.spaces, shards, strict=True):
            there = [moved and before for moved, before in zip(move(space, blocks, pages), there, strict=True)]
        self._note(what, sum(there), pool, start_s)
        return there

    # --- pools beside the first one (v2) -------------------------------------------------------------------------------------------------------

    def batch_exists_v2(self, keys: list[str], pool_transfers: Any = None, extra_info: Any = None) -> Any:
        """The longest prefix that can be restored: its pages in the first pool, and in every other pool what that pool's policy asks for."""
        from sglang.srt.mem_cache.hicache_storage import PoolName, PoolTransferResult

        pages = self.batch_exists(keys, extra_info)
        hits: dict[Any, int] = {PoolName.KV: pages} if pages else {}
        restorable = list(range(1, pages + 1))
        blocks = _keys(keys[:pages])
        for transfer in pool_transfers or []:
            if not restorable:
                break
            pool = self._pools.get(str(transfer.name))
            there = [False] * pages if pool is None else [all(found) for found in zip(*(space.exists(blocks) for space in pool.spaces), strict=True)]
            fits = _restorable(there, transfer)
            if fits:
                hits[transfer.name] = max(fits)
            restorable = [prefix for prefix in restorable if prefix in fits]
        return PoolTransferResult(restorable[-1] if restorable else 0, hits, restorable)

    def batch_get_v2(self, transfers: list[Any], extra_info: Any = None) -> dict[Any, list[bool]]:
        return {each.name: self._read(str(each.name), list(each.keys or []), each.host_indices) for each in transfers}

    def batch_set_v2(self, transfers: list[Any], extra_info: Any = None) -> dict[Any, list[bool]]:
        return {each.name: self._write(str(each.name), list(each.keys or []), each.host_indices, extra_info) for each in transfers}

    # --- copying -------------------------------------------------------------------------------------------------------------------------------

    def get(self, key: str, target_location: Any = None, target_sizes: Any = None) -> Any:
        return self.batch_get([key], None if target_location is None else [target_location])[0]

    def batch_get(self, keys: list[str], target_locations: Any = None, target_sizes: Any = None) -> list[Any]:
        """Flat pages read into the tensors given, or into new ones; None for a miss."""
        pool = self._pools[KV]
        targets = list(target_locations) if target_locations else [pool.host_pool.get_dummy_flat_data_page() for _ in keys]
        hits = pool.spaces[0].get(_keys(keys), [[_bytes(target)] for target in targets])
        return [target if hit else None for target, hit in zip(targets, hits, strict=True)]

    def set(self, key: str, value: Any = None, target_location: Any = None, target_sizes: Any = None) -> bool:
        return self.batch_set(
            [key],
            None if value is None else [value],
            None if target_location is None else [target_location],
            None if target_sizes is None else [target_sizes],
        )

    def batch_set(self, keys: list[str], values: Any = None, target_locations: Any = None, target_sizes: Any = None) -> bool:
        """Store flat pages, given as tensors or as addresses and sizes; True if all of them are there now."""
        if values is not None:
            values = [value.contiguous() if hasattr(value, "contiguous") else value for value in values]  # held until they are stored
            pages = [[_bytes(value)] for value in values]
        elif target_locations is not None and target_sizes is not None:
            pages = [[memory_at(address, size)] for address, size in zip(target_locations, target_sizes, strict=True)]
        else:
            return False
        return all(self._pools[KV].spaces[0].put(_keys(keys), pages))

    def exists(self, key: str) -> bool:
        return self.batch_exists([key]) == 1

    # --- the rest ------------------------------------------------------------------------------------------------------------------------------

    def clear(self) -> None:
        """Forget all pages of all pools, for every engine that shares them."""
        for pool in self._pools.values():
            for space in pool.spaces:
                space.clear()

    def get_stats(self) -> Any:
        """What happened since the last call, for SGLang's metrics."""
        if not self._config.enable_storage_metrics:
            return None
        from sglang.srt.observability.metrics_collector import StorageMetrics

        metrics = StorageMetrics()
        for name, values in self._stats.items():
            count = len(values)
            getattr(metrics, name).extend(values[:count])
            del values[:count]
        return metrics

    def close(self) -> None:
        for pool in self._pools.values():
            for space in pool.spaces:
                space.close()
        self._connection.close()

    def _note(self, direction: str, pages: int, pool: _Pool, start_s: float) -> None:
        if self._config.enable_storage_metrics and pages:
            seconds = max(time.perf_counter() - start_s, 1e-9)
            self._stats[f"{direction}_pgs"].append(pages)
            self._stats[f"{direction}_bandwidth"].append(pages * pool.page_bytes / seconds / (1 << 30))


def _keys(names: Sequence[str]) -> list[bytes]:
    return [block_key(name) for name in names]


def _prefix(extra_info: Any) -> list[bytes]:
    return _keys(getattr(extra_info, "prefix_keys", None) or [])


def _bytes(tensor: Any) -> memoryview:
    """The memory of a contiguous tensor on the host, or of any buffer."""
    if hasattr(tensor, "data_ptr"):
        return memory_at(tensor.data_ptr(), tensor.numel() * tensor.element_size())
    return memoryview(tensor).cast("B")


def _rank_sharded(name: str, host_pool: Any) -> bool:
    """Pools whose pages differ between tensor-parallel ranks although the model's latent cache does not: recurrent states, and a draft model with
    ordinary attention. Shared, a rank could be given another's bytes."""
    return name == "mamba" or (name in ("draft", "draft_swa") and hasattr(host_pool, "head_num"))


def _restorable(there: list[bool], transfer: Any) -> set[int]:
    """The lengths of prefixes for which a pool holds what its policy needs."""
    policy = str(getattr(transfer.hit_policy, "value", transfer.hit_policy))
    if policy == "all_pages":
        return set(range(1, (there.index(False) if False in there else len(there)) + 1))
    if policy == "trailing_pages":
        window = max(1, len(transfer.keys or ()))
        return {length for length in range(1, len(there) + 1) if all(there[max(0, length - window) : length])}
    raise ValueError(f"kvfs has no hit policy {policy}: there are all_pages and trailing_pages")
