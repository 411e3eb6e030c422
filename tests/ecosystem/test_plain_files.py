"""The engines' own file backends on a mount of kvfs: no connector, no plugin, only files."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.real_cluster import RealCluster

torch = pytest.importorskip("torch")
for _engine in ("sglang", "lmcache", "vllm"):
    pytest.importorskip(_engine)

from tests.ecosystem.test_lmcache import assert_all_passed, basic_check  # noqa: E402 (they need the engines too)
from tests.ecosystem.test_sglang import PAGE, PAGES, fill, latent_pool  # noqa: E402

pytestmark = [pytest.mark.ecosystem, pytest.mark.mount]


@pytest.fixture(scope="module")
def mount_point(module_path: Path) -> Iterator[Path]:
    if not os.path.exists("/dev/fuse"):
        pytest.skip("there is no /dev/fuse")
    folder = module_path
    (folder / "mnt").mkdir()
    running = RealCluster(folder / "cluster")
    try:
        running.up("--storage", "2", "--replicas", "1", "--no-restart", "--mount", str(folder / "mnt"))
        yield folder / "mnt"
    finally:
        running.stop()


def test_lmcache_s_files(mount_point: Path, tmp_path: Path) -> None:
    """Its legacy connector, and its adapter for the multiprocess server."""
    (mount_point / "lmc").mkdir()
    extra = "extra_config:\n  save_chunk_meta: true\n"
    assert_all_passed(basic_check(tmp_path, "test_remote", f'remote_url: "fs://host:0{mount_point}/lmc/"\n{extra}'))
    assert len(list((mount_point / "lmc").glob("*.data"))) == 6
    (mount_point / "l2").mkdir()
    adapter = f'{{"type":"fs","base_path":"{mount_point}/l2"}}'
    report = basic_check(tmp_path, "test_l2_adapter", extra, "--l2-adapter", adapter, "--settle-time", "1")
    assert_all_passed(report)


def test_sglang_s_files(mount_point: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig
    from sglang.srt.mem_cache.storage import StorageBackendFactory
    from sglang.srt.mem_cache.utils import get_hash_str

    monkeypatch.setenv("SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR", str(mount_point / "hicache"))
    pool = latent_pool("page_first")
    config = HiCacheStorageConfig(0, 1, 0, 1, 0, 1, True, False, True, "deepseek-ai/DeepSeek-V3")
    storage = StorageBackendFactory.create_backend("file", config, pool)
    storage.register_mem_pool_host(pool)
    keys = get_hash_str(list(range(PAGE * PAGES)), None, PAGE)
    before = fill(pool)
    assert storage.batch_set(keys, [pool.get_data_page(place * PAGE) for place in range(PAGES)])
    assert storage.batch_exists(keys) == PAGES == len(list((mount_point / "hicache").glob("*.bin")))
    pool.kv_buffer.zero_()
    for place, page in enumerate(storage.batch_get(keys, [pool.get_dummy_flat_data_page() for _ in keys])):
        pool.set_from_flat_data_page(place * PAGE, page)
    assert torch.equal(pool.kv_buffer, before)
    storage.clear()
    assert storage.batch_exists(keys) == 0


def test_vllm_s_files(mount_point: Path) -> None:
    from tests.connectors.test_vllm import CHUNK, CHUNKS, keys, spec
    from vllm.v1.kv_offload.base import ReqContext
    from vllm.v1.kv_offload.tiering.base import TransferJob
    from vllm.v1.kv_offload.tiering.factory import SecondaryTierFactory

    size = CHUNK // 4096 * 4096
    memory = torch.randint(0, 256, (CHUNKS, size), dtype=torch.uint8)
    view = memoryview(memory.numpy())
    tier: Any = SecondaryTierFactory.create_secondary_tier({"type": "fs", "root_dir": str(mount_point / "vllm")}, view, spec())
    wanted, request = keys(*range(8)), ReqContext("r")

    def finish(job: TransferJob) -> None:
        (tier.submit_load if job.is_promotion else tier.submit_store)(job)
        tier.drain_jobs()
        deadline = time.monotonic() + 10
        while not (results := list(tier.get_finished_jobs())):
            assert time.monotonic() < deadline
        assert [result.success for result in results] == [True]

    finish(TransferJob(1, wanted, torch.arange(8).numpy(), False, request))
    finish(TransferJob(2, wanted, torch.arange(8, 16).numpy(), True, request))
    assert torch.equal(memory[:8], memory[8:16])
    assert len(list((mount_point / "vllm").rglob("*.bin"))) == 8
    tier.shutdown()
