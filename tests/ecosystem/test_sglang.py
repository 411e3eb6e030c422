"""The real SGLang: its factory, its configuration and its host pools, in every layout."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("sglang")

pytestmark = [pytest.mark.ecosystem, pytest.mark.cluster]

PAGE, PAGES, LAYERS, WIDTH = 64, 6, 3, 576


def latent_pool(layout: str) -> Any:
    """SGLang's pool of latent caches, on the host alone."""
    from sglang.srt.mem_cache.pool_host.mla import MLATokenToKVPoolHost

    pool = MLATokenToKVPoolHost.__new__(MLATokenToKVPoolHost)
    size = PAGE * PAGES
    shape = {
        "layer_first": (LAYERS, size, 1, WIDTH),
        "page_first": (size, LAYERS, 1, WIDTH),
        "page_first_direct": (PAGES, LAYERS, PAGE, 1, WIDTH),
    }[layout]
    pool.layout, pool.layer_num, pool.kv_cache_dim, pool.dtype = layout, LAYERS, WIDTH, torch.bfloat16
    pool.page_size, pool.dcp_size, pool.dcp_rank, pool.size, pool.page_num = PAGE, 1, 0, size, PAGES
    pool.device, pool.pin_memory, pool._size_per_token = "cpu", False, WIDTH * 2 * LAYERS
    pool.kv_buffer = torch.zeros(shape, dtype=torch.bfloat16)
    return pool


def head_pool(layout: str) -> Any:
    """SGLang's pool of keys and values."""
    from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost

    pool = MHATokenToKVPoolHost.__new__(MHATokenToKVPoolHost)
    size, heads, width = PAGE * PAGES, 2, 32
    shape = {
        "layer_first": (2, LAYERS, size, heads, width),
        "page_first": (2, size, LAYERS, heads, width),
        "page_first_direct": (2, PAGES, LAYERS, PAGE, heads, width),
    }[layout]
    pool.layout, pool.layer_num, pool.head_num, pool.head_dim, pool.dtype = layout, LAYERS, heads, width, torch.bfloat16
    pool.page_size, pool.size, pool.page_num, pool.device, pool.pin_memory = PAGE, size, PAGES, "cpu", False
    pool.kv_buffer = torch.zeros(shape, dtype=torch.bfloat16)
    return pool


def backend(pool: Any, settings: dict[str, Any], *, v1: int, mla: bool) -> Any:
    from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig
    from sglang.srt.mem_cache.storage import StorageBackendFactory

    extra = {"backend_name": "kvfs", "module_path": "kvfs.kvcache.connectors.sglang", "class_name": "KvfsHiCacheStorage", "interface_v1": v1}
    config = HiCacheStorageConfig(
        tp_rank=0,
        tp_size=1,
        pp_rank=0,
        pp_size=1,
        attn_cp_rank=0,
        attn_cp_size=1,
        is_mla_model=mla,
        enable_storage_metrics=True,
        is_page_first_layout=pool.layout == "page_first",
        model_name="deepseek-ai/DeepSeek-V3",
        extra_config={**extra, **settings},
    )
    storage = StorageBackendFactory.create_backend("dynamic", config, pool)
    storage.register_mem_pool_host(pool)
    storage.on_host_pools_registered()
    return storage


def fill(pool: Any) -> Any:
    torch.manual_seed(1)
    pool.kv_buffer.copy_(torch.randn(pool.kv_buffer.shape))
    return pool.kv_buffer.clone()


@pytest.mark.parametrize("make", [latent_pool, head_pool])
@pytest.mark.parametrize("layout", ["layer_first", "page_first", "page_first_direct"])
def test_zero_copy_pages_of_real_pools(settings: dict[str, Any], layout: str, make: Any) -> None:
    from sglang.srt.mem_cache.hicache_storage import HiCacheStorageExtraInfo
    from sglang.srt.mem_cache.utils import get_hash_str

    pool = make(layout)
    storage = backend(pool, settings, v1=1, mla=make is latent_pool)
    tokens = list(range(PAGE * PAGES))
    keys, where = get_hash_str(tokens, None, PAGE), torch.arange(PAGE * PAGES)
    before = fill(pool)
    assert all(storage.batch_set_v1(keys, where, HiCacheStorageExtraInfo(prefix_keys=[])))
    assert storage.batch_exists([*keys, "deadbeef"]) == len(keys) == PAGES
    pool.kv_buffer.zero_()
    assert all(storage.batch_get_v1(keys, where))
    assert torch.equal(pool.kv_buffer, before)
    assert storage.get_stats().prefetch_pgs == [PAGES]
    storage.clear()
    assert storage.batch_exists(keys) == 0
    storage.close()


@pytest.mark.parametrize("make", [latent_pool, head_pool])
@pytest.mark.parametrize("layout", ["layer_first", "page_first", "page_first_direct"])
def test_copied_pages_of_real_pools(settings: dict[str, Any], layout: str, make: Any) -> None:
    """As the engine's generic path does it, without interface_v1."""
    from sglang.srt.mem_cache.utils import get_hash_str

    pool = make(layout)
    storage = backend(pool, settings, v1=0, mla=make is latent_pool)
    keys = get_hash_str(list(range(PAGE * PAGES)), None, PAGE)
    before = fill(pool)
    assert storage.batch_set(keys, [pool.get_data_page(place * PAGE) for place in range(PAGES)])
    pool.kv_buffer.zero_()
    pages = storage.batch_get(keys, [pool.get_dummy_flat_data_page() for _ in keys])
    for place, page in enumerate(pages):
        pool.set_from_flat_data_page(place * PAGE, page)
    assert torch.equal(pool.kv_buffer, before)
    assert storage.batch_get(["0" * 64], [pool.get_dummy_flat_data_page()]) == [None]
    storage.close()


def test_kvfs_computes_sglang_s_own_keys() -> None:
    from sglang.srt.mem_cache.utils import get_hash_str

    from kvfs.kvcache.keys import sglang_chain

    tokens = [7, 8, 2**31, *range(125)]
    assert [key.hex() for key in sglang_chain(tokens, PAGE)] == get_hash_str(tokens, None, PAGE)


def test_the_engine_s_fault_injection_wraps_it(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_TEST_HICACHE_BACKEND_RANDOM_DELAY", "0.01")
    pool = latent_pool("page_first")
    storage = backend(pool, settings, v1=1, mla=True)
    assert type(storage).__name__ == "HiCacheStorageFailureInjector"
    assert all(storage.batch_set_v1(["1" * 64], torch.arange(PAGE))) and storage.batch_exists(["1" * 64]) == 1
