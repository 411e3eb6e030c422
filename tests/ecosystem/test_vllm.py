"""The real vLLM: its factory builds our tier, and its tiering manager cascades chunks into it and promotes them out of it."""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

np = pytest.importorskip("numpy")
pytest.importorskip("vllm")

from tests.connectors.test_vllm import CHUNK, CHUNKS, keys, spec  # noqa: E402 (it needs vLLM too)

pytestmark = [pytest.mark.ecosystem, pytest.mark.cluster]


class Region:
    """Host memory as vLLM's shared region shows it to its manager."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, CHUNKS * CHUNK)

    def create_kv_memoryview(self) -> memoryview:
        return memoryview(np.frombuffer(self.memory, dtype=np.int8).reshape(CHUNKS, CHUNK))

    def cleanup(self) -> None:
        pass


Make = Callable[[], SimpleNamespace]


@pytest.fixture
def tiered(settings: dict[str, Any]) -> Iterator[Make]:
    from vllm.v1.kv_offload.tiering.factory import SecondaryTierFactory
    from vllm.v1.kv_offload.tiering.manager import CPUPrimaryTierOffloadingManager, TieringOffloadingManager

    made: list[Any] = []

    def make() -> SimpleNamespace:
        region: Any = Region()
        primary = CPUPrimaryTierOffloadingManager(num_chunks=CHUNKS, mmap_region=region)
        configuration = {"type": "KvfsTier", "module_path": "kvfs.kvcache.connectors.vllm", "locality": "REMOTE", **settings}
        configuration["backpressure"] = {"backpressure_cls": "EMABackpressureDetector"}
        tier = SecondaryTierFactory.create_secondary_tier(configuration, primary.get_kv_memoryview(), spec())
        manager = TieringOffloadingManager(primary, [tier])
        made.append(manager)
        return SimpleNamespace(manager=manager, memory=region.memory, tier=tier)

    yield make
    for each in made:
        each.shutdown()


def test_chunks_cascade_and_are_promoted(tiered: Make) -> None:
    from vllm.v1.kv_offload.base import LookupResult, ReqContext, ScheduleEndContext

    first, second = tiered(), tiered()
    wanted = keys(*range(6))
    content = bytes(range(256)) * (6 * CHUNK // 256 + 1)

    def step(side: SimpleNamespace) -> None:
        with side.manager.lock:
            side.manager.on_schedule_end(ScheduleEndContext((), ()))
        time.sleep(0.01)

    request = ReqContext("r1")
    first.manager.on_new_request(request)
    prepared = first.manager.prepare_store(wanted, request)
    assert prepared is not None and list(prepared.keys_to_store) == wanted
    for place, chunk_id in enumerate(prepared.store_spec.block_ids):  # the workers copy from the GPU
        first.memory[int(chunk_id) * CHUNK : (int(chunk_id) + 1) * CHUNK] = content[place * CHUNK : (place + 1) * CHUNK]
    first.manager.complete_store(wanted, request)
    end = time.monotonic() + 20
    while first.tier._space.exists(wanted) != [True] * 6:
        assert time.monotonic() < end
        step(first)

    other = ReqContext("r2")
    second.manager.on_new_request(other)
    while [second.manager.lookup(key, other) for key in wanted] != [LookupResult.HIT] * 6:
        assert time.monotonic() < end
        step(second)
    loaded = second.manager.prepare_load(wanted, other)
    for place, chunk_id in enumerate(loaded.block_ids):
        assert second.memory[int(chunk_id) * CHUNK : (int(chunk_id) + 1) * CHUNK] == content[place * CHUNK : (place + 1) * CHUNK]
    second.manager.complete_load(wanted, other)
    second.manager.on_request_finished(other)
    step(second)
    assert second.manager.lookup(keys(99)[0], ReqContext("r3")) in (LookupResult.RETRY, LookupResult.MISS)


def test_kvfs_computes_vllm_s_own_keys() -> None:
    from vllm.utils.hashing import sha256_cbor

    from kvfs.kvcache.keys import vllm_chain, vllm_none_hash

    none_hash = vllm_none_hash("0")
    last, expected = none_hash, []
    for start in (0, 16):
        last = sha256_cbor((last, tuple(range(start, start + 16)), None))
        expected.append(last)
    assert vllm_chain(list(range(40)), 16, none_hash=none_hash) == expected
