"""SGLang's HiCache on kvfs: the calls of the engine in its order, on pools of every layout, with every byte compared."""

from __future__ import annotations

import ctypes
import hashlib
import random
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest
from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig, HiCacheStorageExtraInfo, PoolHitPolicy, PoolName, PoolTransfer
from tests.cluster.test_lifecycle import wait_for

from kvfs.common.errors import InvalidArgument
from kvfs.kvcache.connectors.sglang import KvfsHiCacheStorage

if TYPE_CHECKING:
    from tests.cluster.conftest import RealCluster

pytestmark = pytest.mark.cluster

PAGE = 16
LAYERS = 3
TOKEN = 1152


class Pool:
    """A host pool: `parts` of `layers` of token rows in one piece of memory, by layout."""

    def __init__(self, layout: str, pages: int = 8, parts: int = 1, page_size: int = PAGE, heads: int = 1) -> None:
        self.heads = heads
        self.layout, self.dtype, self.page_size, self.pages, self.parts = layout, "torch.bfloat16", page_size, pages, parts
        self.kv_buffer = bytearray(pages * self.page_bytes)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self.kv_buffer))

    @property
    def page_bytes(self) -> int:
        return self.parts * LAYERS * self.page_size * self.heads * TOKEN

    def get_page_buffer_meta(self, indices: Any) -> tuple[list[int], list[int]]:
        first = [int(row) // self.page_size for row in list(indices)[:: self.page_size]]
        pieces = self.parts * (LAYERS if self.layout == "layer_first" else 1)
        size = self.page_bytes // pieces
        found = [self._address + (piece * self.pages + page) * size for page in first for piece in range(pieces)]
        return found, [size] * len(found)

    def get_split_heads_page_buffer_meta(self, indices: Any, split: int) -> tuple[list[int], list[int]]:
        whole, sizes = self.get_page_buffer_meta(indices)
        size = sizes[0] // split
        found = []
        for page in range(0, len(whole), 2):
            found += [whole[page + part] + head * size for head in range(split) for part in range(2)]
        return found, [size] * len(found)

    def get_dummy_flat_data_page(self) -> bytearray:
        return bytearray(self.page_bytes)

    def fill(self, seed: int) -> bytes:
        self.kv_buffer[:] = random.Random(seed).randbytes(len(self.kv_buffer))
        return bytes(self.kv_buffer)

    def wipe(self) -> None:
        self.kv_buffer[:] = bytes(len(self.kv_buffer))


def names(count: int, seed: int = 0) -> list[str]:
    """Page hashes as SGLang makes them."""
    found, last = [], b"%d" % seed
    for _ in range(count):
        last = hashlib.sha256(last).digest()
        found.append(last.hex())
    return found


def indices(*pages: int, page: int = PAGE) -> list[int]:
    return [number * page + token for number in pages for token in range(page)]


Make = Callable[..., KvfsHiCacheStorage]


@pytest.fixture
def backend(settings: dict[str, Any]) -> Iterator[Make]:
    made: list[KvfsHiCacheStorage] = []

    def make(pool: Any = None, *, extra: dict[str, Any] | None = None, **changes: Any) -> KvfsHiCacheStorage:
        own = {"backend_name": "kvfs", "module_path": "m", "class_name": "c", "interface_v1": 1, **settings, **(extra or {})}
        config: dict[str, Any] = {"tp_rank": 0, "tp_size": 1, "pp_rank": 0, "pp_size": 1, "attn_cp_rank": 0, "attn_cp_size": 1}
        config |= {"is_mla_model": True, "enable_storage_metrics": True, "is_page_first_layout": True}
        config |= {"model_name": "deepseek-ai/DeepSeek-V3", "extra_config": own}
        made.append(KvfsHiCacheStorage(HiCacheStorageConfig(**{**config, **changes}), {}))
        if pool is not None:
            made[-1].register_mem_pool_host(pool)
            made[-1].on_host_pools_registered()
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("layout", ["layer_first", "page_first", "page_first_direct"])
def test_pages_come_back_as_they_were(backend: Make, layout: str, parts: int) -> None:
    pool = Pool(layout, parts=parts)
    storage = backend(pool)
    before, keys = pool.fill(1), names(8)
    assert storage.batch_exists(keys) == 0 and not any(storage.batch_get_v1(keys, indices(*range(8))))
    pool.fill(1)
    assert storage.batch_set_v1(keys, indices(*range(8)), HiCacheStorageExtraInfo(prefix_keys=names(2, seed=9))) == [True] * 8
    assert storage.batch_exists([*keys, "deadbeef"]) == 8 and storage.exists(keys[3])
    pool.wipe()
    assert storage.batch_get_v1(keys, indices(*range(8)), HiCacheStorageExtraInfo()) == [True] * 8
    assert pool.kv_buffer == before


def test_a_page_goes_where_it_is_asked_for_and_a_miss_spoils_no_other(backend: Make) -> None:
    pool = Pool("layer_first")
    storage = backend(pool)
    pool.fill(2)
    keys = names(4)
    want, _ = pool.get_page_buffer_meta(indices(2))
    content = b"".join(ctypes.string_at(address, PAGE * TOKEN) for address in want)
    assert all(storage.batch_set_v1(keys, indices(0, 1, 2, 3)))
    pool.wipe()
    assert storage.batch_get_v1([keys[2], "0" * 64, keys[2]], indices(7, 6, 5)) == [True, False, True]
    for page in (7, 5):
        where, _ = pool.get_page_buffer_meta(indices(page))
        assert b"".join(ctypes.string_at(address, PAGE * TOKEN) for address in where) == content
    assert storage.batch_exists([keys[0], "0" * 64, keys[1]]) == 1


def test_the_first_writer_wins_and_a_second_set_is_true(backend: Make) -> None:
    pool = Pool("page_first")
    storage = backend(pool)
    first, keys = pool.fill(3), names(8)
    assert all(storage.batch_set_v1(keys, indices(*range(8))))
    pool.fill(4)
    assert all(storage.batch_set_v1(keys, indices(*range(8))))
    assert all(storage.batch_get_v1(keys, indices(*range(8)))) and pool.kv_buffer == first


def test_batches_larger_than_the_staging_memory(backend: Make) -> None:
    pool = Pool("layer_first", pages=40)
    storage = backend(pool, extra={"staging": 3 * pool.page_bytes})
    before, keys = pool.fill(5), names(40)
    assert all(storage.batch_set_v1(keys, indices(*range(40))))
    pool.wipe()
    assert all(storage.batch_get_v1(keys, indices(*range(40)))) and pool.kv_buffer == before


def test_ranks_share_what_sglang_says_they_share(backend: Make, cluster: RealCluster) -> None:
    pools = [Pool("page_first"), Pool("page_first")]
    keys = names(8)
    mla = [backend(pool, tp_rank=rank, tp_size=2) for rank, pool in enumerate(pools)]
    before = pools[0].fill(6)
    assert all(mla[0].batch_set_v1(keys, indices(*range(8))))
    assert all(mla[1].batch_get_v1(keys, indices(*range(8)))) and pools[1].kv_buffer == before
    heads = [backend(pool, tp_rank=rank, tp_size=2, is_mla_model=False) for rank, pool in enumerate(pools)]
    assert all(heads[0].batch_set_v1(keys, indices(*range(8))))
    assert heads[1].batch_exists(keys) == 0
    # Another layout, type, page size, pipeline or context rank, or model: other pages.
    others = [
        backend(Pool("page_first_direct")),
        backend(Pool("page_first", page_size=8)),
        backend(pools[0], pp_rank=1, pp_size=2),
        backend(pools[0], attn_cp_rank=1, attn_cp_size=2),
        backend(pools[0], model_name="other"),
        backend(pools[0], extra={"interface_v1": 0}),
    ]
    assert [other.batch_exists(keys) for other in others] == [0] * len(others)


def test_heads_split_for_a_wider_engine(backend: Make) -> None:
    """Two ranks of two heads each write what four ranks of one head each read."""
    common: dict[str, Any] = {"is_mla_model": False, "tp_lcm_size": 4}
    wide = Pool("page_head", parts=2, heads=2)
    keys, all_pages = names(8), indices(*range(8))
    for rank in range(2):
        wide.fill(70 + rank)
        assert all(backend(wide, tp_rank=rank, tp_size=2, should_split_heads=True, **common).batch_set_v1(keys, all_pages))
    wide.fill(71)
    narrow = Pool("page_head", parts=2)
    reader = backend(narrow, tp_rank=3, tp_size=4, **common)
    assert reader.batch_get_v1(keys, all_pages) == [True] * 8
    half = wide.page_bytes // 4
    for page in range(8):
        addresses, sizes = narrow.get_page_buffer_meta(indices(page))
        got = [ctypes.string_at(address, size) for address, size in zip(addresses, sizes, strict=True)]
        whole = [ctypes.string_at(address, 2 * half) for address in wide.get_page_buffer_meta(indices(page))[0]]
        assert got == [part[half:] for part in whole]


def test_pools_beside_the_first_and_their_policies(backend: Make) -> None:
    pool, sidecar, states = Pool("page_first"), Pool("page_first"), Pool("page_first", page_size=1)
    storage = backend(pool)
    storage.register_mem_host_pool_v2(pool, PoolName.KV)
    storage.register_mem_host_pool_v2(sidecar, PoolName.INDEXER)
    storage.register_mem_host_pool_v2(states, PoolName.MAMBA)
    keys, kept = names(8), sidecar.fill(8)
    pool.fill(9), states.fill(10)
    assert all(storage.batch_set_v1(keys[:6], indices(*range(6))))
    every = PoolTransfer(name=PoolName.INDEXER, keys=keys[:5], host_indices=indices(*range(5)))
    last = PoolTransfer(name=PoolName.MAMBA, keys=[keys[3]], host_indices=[3], hit_policy=PoolHitPolicy.TRAILING_PAGES)
    assert storage.batch_set_v2([every, last]) == {PoolName.INDEXER: [True] * 5, PoolName.MAMBA: [True]}
    found = storage.batch_exists_v2(keys, [PoolTransfer(name=PoolName.INDEXER)])
    assert (found.kv_hit_pages, found.extra_pool_hit_pages) == (5, {PoolName.KV: 6, PoolName.INDEXER: 5})
    found = storage.batch_exists_v2(keys, [PoolTransfer(name=PoolName.INDEXER), last], HiCacheStorageExtraInfo())
    assert (found.kv_hit_pages, found.restorable_prefix_pages) == (4, [4]), "only there does the recurrent state end"
    assert storage.batch_exists_v2(keys, []).kv_hit_pages == 6
    assert storage.batch_exists_v2(keys, [PoolTransfer(name=PoolName.SWA)]).kv_hit_pages == 0, "a pool that nobody registered holds nothing"
    with pytest.raises(ValueError, match="block_groups"):
        storage.batch_exists_v2(keys, [PoolTransfer(name=PoolName.INDEXER, hit_policy=PoolHitPolicy.BLOCK_GROUPS)])
    sidecar.wipe()
    assert storage.batch_get_v2([PoolTransfer(name=PoolName.INDEXER, keys=keys, host_indices=indices(*range(8)))]) == {
        PoolName.INDEXER: [True] * 5 + [False] * 3
    }
    assert sidecar.kv_buffer[: 5 * sidecar.page_bytes] == kept[: 5 * sidecar.page_bytes]


def test_a_pool_without_memory_only_numbers_pages(backend: Make) -> None:
    anchor, sidecar = Pool("page_first"), Pool("page_first")
    anchor.kv_buffer = None  # type: ignore[assignment]
    storage = backend(anchor)
    storage.register_mem_host_pool_v2(sidecar, PoolName.INDEXER)
    keys = names(4)
    assert storage.batch_exists(keys) == 4 and storage.batch_get_v1(keys, []) == storage.batch_set_v1(keys, []) == [True] * 4
    assert storage.batch_exists_v2(keys, [PoolTransfer(name=PoolName.INDEXER)]).kv_hit_pages == 0


def test_recurrent_states_are_never_shared_between_ranks(backend: Make) -> None:
    pool, states = Pool("page_first"), Pool("page_first", page_size=1)
    ranks = [backend(pool, tp_rank=rank, tp_size=2) for rank in range(2)]
    for each in ranks:
        each.register_mem_host_pool_v2(states, PoolName.MAMBA)
    transfer = PoolTransfer(name=PoolName.MAMBA, keys=names(1), host_indices=[0])
    assert ranks[0].batch_set_v2([transfer]) == {PoolName.MAMBA: [True]}
    assert ranks[1].batch_get_v2([transfer]) == {PoolName.MAMBA: [False]}


def test_the_copying_calls(backend: Make) -> None:
    pool = Pool("page_first")
    storage = backend(pool, extra={"interface_v1": 0})
    keys = names(4)
    pages = [random.Random(number).randbytes(pool.page_bytes) for number in range(4)]
    assert storage.set(keys[0], pages[0]) and storage.batch_set(keys[1:3], pages[1:3])
    held = ctypes.create_string_buffer(pages[3], pool.page_bytes)
    assert storage.set(keys[3], target_location=ctypes.addressof(held), target_sizes=pool.page_bytes)
    assert not storage.set(keys[3])
    target = bytearray(pool.page_bytes)
    assert storage.get(keys[0], target) is target and target == pages[0]
    assert storage.batch_get(keys) == pages and storage.get("1" * 64) is None
    assert storage.get(keys[0], bytearray(10)) is None, "a page that does not fit is a miss"


def test_clear_forgets_everything_for_all_ranks(backend: Make) -> None:
    pool = Pool("page_first")
    ranks = [backend(pool, tp_rank=rank, tp_size=2) for rank in range(2)]
    keys = names(8)
    assert all(ranks[0].batch_set_v1(keys, indices(*range(8))))
    for each in ranks:  # as SGLang does: every rank clears
        each.clear()
    assert [each.batch_exists(keys) for each in ranks] == [0, 0]
    # Each hears that its space went, and makes it anew.
    wait_for(lambda: all(ranks[0].batch_set_v1(keys, indices(*range(8)))), 20, "pages are stored again")
    wait_for(lambda: ranks[1].batch_exists(keys) == 8, 20, "the other rank finds them")


def test_metrics_and_wrong_settings(backend: Make) -> None:
    pool = Pool("page_first")
    storage = backend(pool)
    assert all(storage.batch_set_v1(names(8), indices(*range(8)))) and all(storage.batch_get_v1(names(3), indices(0, 1, 2)))
    metrics = storage.get_stats()
    assert (metrics.backup_pgs, metrics.prefetch_pgs) == ([8], [3]) and metrics.prefetch_bandwidth[0] > 0
    assert storage.get_stats().backup_pgs == []
    assert backend(pool, enable_storage_metrics=False).get_stats() is None
    with pytest.raises(InvalidArgument, match="quota is 'much'"):
        backend(pool, extra={"quota": "much"})
    with pytest.raises(InvalidArgument, match="no setting 'qouta'"):
        backend(pool, extra={"qouta": "1G"})
    assert storage.batch_set_v1(names(1), indices(0, 1)) == [False], "indices that fit no page"
