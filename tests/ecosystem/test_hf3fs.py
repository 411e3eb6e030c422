"""The engines' own 3FS backends, unmodified, over a kvfs mount and our hf3fs_fuse: SGLang's HiCacheHF3FS, LMCache's hf3fs connector."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
DISTRIBUTION = Path(__file__).resolve().parents[2] / "deploy" / "hf3fs_fuse"
sys.path.insert(0, str(DISTRIBUTION))

from tests.mount.cluster import running_cluster  # noqa: E402

pytestmark = [pytest.mark.ecosystem, pytest.mark.mount]

PAGES = 6


@pytest.fixture(scope="module")
def mount_point() -> Iterator[Path]:
    if not os.path.exists("/dev/fuse"):
        pytest.skip("there is no /dev/fuse")
    with running_cluster(storage=2, replicas=2) as cluster:
        yield cluster.mount("mount")
        cluster.check()


@pytest.fixture
def signals_kept() -> Iterator[None]:
    """SGLang's backend takes the signal handlers of its process."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.fixture
def page_index() -> Iterator[str]:
    """SGLang's page-index server, which models with a latent cache need."""
    import uvicorn
    from sglang.srt.mem_cache.storage.hf3fs.mini_3fs_metadata_server import Hf3fsMetadataServer

    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(Hf3fsMetadataServer().app, log_level="warning"))
        thread = threading.Thread(target=lambda: server.run([listening]))
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        server.should_exit = True
        thread.join(20)


@pytest.mark.skipif(importlib.util.find_spec("sglang") is None, reason="SGLang is not installed")
@pytest.mark.parametrize("layout", ["layer_first", "page_first", "page_first_direct"])
@pytest.mark.parametrize("kind", ["latent", "heads"])
def test_sglang(
    mount_point: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signals_kept: None, request: pytest.FixtureRequest, kind: str, layout: str
) -> None:
    """Its factory, its configuration file, its pools: pages set, found, lost from memory, got; by a second rank too where the ranks share them."""
    from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig
    from sglang.srt.mem_cache.storage import StorageBackendFactory
    from sglang.srt.mem_cache.utils import get_hash_str
    from tests.ecosystem.test_sglang import PAGE, fill, head_pool, latent_pool

    pool: Any = latent_pool(layout) if kind == "latent" else head_pool(layout)
    if kind == "heads":
        pool.v_head_dim = pool.head_dim
    settings: dict[str, Any] = {"file_path_prefix": str(mount_point / f"{kind}-{layout}"), "file_size": 64 << 20, "numjobs": 4, "entries": 8}
    if kind == "latent":
        settings["metadata_server_url"] = request.getfixturevalue("page_index")
    (tmp_path / "hf3fs.json").write_text(json.dumps(settings))
    monkeypatch.setenv("SGLANG_HICACHE_HF3FS_CONFIG_PATH", str(tmp_path / "hf3fs.json"))

    def backend(rank: int) -> Any:
        config = HiCacheStorageConfig(
            tp_rank=rank,
            tp_size=2,
            pp_rank=0,
            pp_size=1,
            attn_cp_rank=0,
            attn_cp_size=1,
            is_mla_model=kind == "latent",
            enable_storage_metrics=True,
            is_page_first_layout=layout == "page_first",
            model_name="m",
        )
        storage = StorageBackendFactory.create_backend("hf3fs", config, pool)
        storage.register_mem_pool_host(pool)
        return storage

    first = backend(0)
    keys, where = get_hash_str(list(range(PAGE * PAGES)), None, PAGE), torch.arange(PAGE * PAGES)
    before = fill(pool)
    assert first.batch_exists(keys) == 0
    assert all(first.batch_set_v1(keys, where))
    assert first.batch_exists([*keys, "0" * 64]) == PAGES
    for storage in [first, backend(1)] if kind == "latent" else [first]:
        pool.kv_buffer.zero_()
        assert all(storage.batch_get_v1(keys, where))
        assert torch.equal(pool.kv_buffer, before)
        assert not any(storage.batch_get_v1(["f" * 64], where[:PAGE]))
        storage.close()
    assert any(name.startswith(f"{kind}-{layout}") for name in os.listdir(mount_point))


@pytest.mark.skipif(importlib.util.find_spec("lmcache") is None, reason="LMCache is not installed")
def test_lmcache_basic_check(mount_point: Path, tmp_path: Path) -> None:
    """LMCache's own check of a remote backend: what is not there, put, what is there, get with its content. It exits 0 whatever it finds.
    (Its other mode, test_storage_manager, fails with this connector on any storage: the objects it makes have not the size that it configures.)"""
    base = mount_point / "lmcache"
    base.mkdir()
    settings = {
        "chunk_size": 256,
        "local_cpu": False,
        "max_local_cpu_size": 0.5,
        "remote_serde": "naive",
        "remote_url": f"hf3fs://{base}",
        "extra_config": {
            "save_chunk_meta": True,
            "hf3fs_mount_point": str(mount_point),
            "hf3fs_iov_size": 100 << 20,
            "hf3fs_ior_entries": 128,
            "hf3fs_io_thread_num": 2,
        },
    }
    (tmp_path / "lmcache.yaml").write_text(json.dumps(settings))  # JSON is YAML
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(DISTRIBUTION), os.environ.get("PYTHONPATH", "")]),
        "LMCACHE_CONFIG_FILE": str(tmp_path / "lmcache.yaml"),
        "LMCACHE_TRACK_USAGE": "false",
    }
    command = [sys.executable, "-m", "lmcache.v1.basic_check", "--mode", "test_remote", "--num-keys", "8"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=180, check=False)
    rates = dict(re.findall(r"^\| (\w[^|]*?) *\|.*\| *([\d.]+)% *\|", done.stdout, re.MULTILINE))
    assert done.returncode == 0, done.stdout + done.stderr
    assert rates == dict.fromkeys(("EXISTS (non-exist)", "PUT", "EXISTS (exist)", "GET"), "100.0"), done.stdout + done.stderr
    assert len(list(base.iterdir())) == 8
