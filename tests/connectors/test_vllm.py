"""vLLM's secondary tier on kvfs: the calls of its tiering manager, step by step, with every chunk compared."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from vllm.v1.kv_offload.base import LookupResult, Medium, ReqContext, ScheduleEndContext
from vllm.v1.kv_offload.config import (
    OffloadingCacheConfig,
    OffloadingConfig,
    OffloadingGroupConfig,
    OffloadingModelConfig,
    OffloadingParallelConfig,
)
from vllm.v1.kv_offload.tiering.base import TransferJob

from kvfs.common.errors import InvalidArgument
from kvfs.kvcache.connectors.vllm import BLOCKS_METRIC, KvfsTier

if TYPE_CHECKING:
    from tests.cluster.conftest import RealCluster

pytestmark = pytest.mark.cluster

CHUNKS, CHUNK = 32, 150_000
HIT, MISS, RETRY = LookupResult.HIT, LookupResult.MISS, LookupResult.RETRY


def spec(tp_size: int = 1, *, agnostic: bool = False, model: str = "meta-llama/Llama-3-8B") -> Any:
    config = OffloadingConfig(
        groups=(OffloadingGroupConfig(16, ("layers.0", "layers.1"), 0),),
        worker_kv_bytes_per_block=CHUNK,
        enable_kv_cache_events=False,
        extra_config={},
        engine_id="e",
        model=OffloadingModelConfig(model, "bfloat16"),
        cache=OffloadingCacheConfig(16, 4),
        parallel=OffloadingParallelConfig(0, tp_size, tp_size, 1, 1, 1, 0, 1, None, agnostic),
        kv_cache_layout="NHD",
    )
    return SimpleNamespace(config=config, blocks_per_chunk=4)


def keys(*numbers: int) -> list[bytes]:
    """Block hash and group index, as vLLM packs them."""
    return [hashlib.sha256(b"%d" % number).digest() + (0).to_bytes(4, "big") for number in numbers]


class Host:
    """vLLM's primary tier and its manager's steps around one tier."""

    def __init__(self, tier_spec: Any, **settings: Any) -> None:
        self.memory = bytearray(random.Random(1).randbytes(CHUNKS * CHUNK))
        self.view = memoryview(self.memory).cast("B", (CHUNKS, CHUNK))
        self.tier = KvfsTier(tier_spec, self.view, "KvfsTier", **settings)
        self.jobs = 0

    def step(self) -> None:
        self.tier.on_schedule_end(ScheduleEndContext((), ()))

    def look(self, wanted: list[bytes], request: ReqContext) -> list[Any]:
        """Step until every verdict is there."""
        end = time.monotonic() + 20
        while RETRY in (found := [self.tier.lookup(key, request) for key in wanted]):
            assert time.monotonic() < end
            self.step()
            time.sleep(0.01)
        return found

    def submit(self, load: bool, job_keys: list[bytes], chunk_ids: list[int], request: ReqContext) -> int:
        self.jobs += 1
        (self.tier.submit_load if load else self.tier.submit_store)(TransferJob(self.jobs, job_keys, chunk_ids, load, request))
        return self.jobs

    def finish(self, load: bool, job_keys: list[bytes], chunk_ids: list[int], request: ReqContext) -> Any:
        job = self.submit(load, job_keys, chunk_ids, request)
        self.tier.drain_jobs()
        [result] = self.tier.get_finished_jobs()
        assert result.job_id == job
        return result

    def chunk(self, number: int) -> bytes:
        return bytes(self.memory[number * CHUNK : (number + 1) * CHUNK])


@pytest.fixture
def host(settings: dict[str, Any]) -> Iterator[Callable[..., Host]]:
    made: list[Host] = []

    def make(tier_spec: Any = None, **more: Any) -> Host:
        made.append(Host(tier_spec or spec(), **{**settings, **more}))
        return made[-1]

    yield make
    for each in made:
        each.tier.shutdown()
        each.view.release()


def test_chunks_come_back_as_they_were(host: Callable[..., Host]) -> None:
    one, request = host(), ReqContext("r1")
    wanted = keys(*range(10))
    before = [one.chunk(number) for number in range(10)]
    assert [one.tier.lookup(key, request) for key in wanted] == [RETRY] * 10, "no lookup waits"
    assert one.look(wanted, request) == [MISS] * 10
    stored = one.finish(False, wanted, list(range(10)), request)
    assert (stored.success, stored.transfer_bytes) == (True, 10 * CHUNK) and stored.transfer_time > 0
    one.tier.on_request_finished(request)
    assert one.finish(False, wanted[:3], [20, 21, 22], request).success, "what is there is stored"
    two, other = host(), ReqContext("r2")
    assert two.look([*wanted, *keys(77)], other) == [HIT] * 10 + [MISS]
    two.memory[:] = bytes(len(two.memory))
    assert two.finish(True, wanted[::-1], list(range(19, 9, -1)), other).success
    assert [two.chunk(10 + number) for number in range(10)] == before
    assert not any(two.memory[: 10 * CHUNK]) and not any(two.memory[20 * CHUNK :])
    assert KvfsTier.medium is Medium.STORAGE


def test_a_load_that_fails_in_part_is_a_miss_from_then_on(host: Callable[..., Host]) -> None:
    one, request = host(), ReqContext("r")
    wanted = keys(*range(4))
    assert one.finish(False, wanted, [0, 1, 2, 3], request).success
    assert one.look(wanted, request) == [HIT] * 4
    one.tier._space.remove([wanted[1], wanted[2]])  # evicted between lookup and load
    content = one.chunk(3)
    result = one.finish(True, wanted, [4, 5, 6, 7], request)
    assert not result.success and result.successful_keys == (wanted[0], wanted[3]) and one.chunk(7) == content
    assert [one.tier.lookup(key, request) for key in wanted] == [HIT, MISS, MISS, HIT], "or the scheduler would load for ever"
    one.tier.on_request_finished(request)
    assert not one.tier._verdicts and not one.tier._asked
    nothing = one.finish(True, keys(50), [0], request)
    assert (nothing.success, nothing.successful_keys) == (False, None)


def test_verdicts_live_as_long_as_the_requests_that_asked(host: Callable[..., Host]) -> None:
    one, first, second = host(), ReqContext("a"), ReqContext("b")
    [key] = keys(1)
    assert one.look([key], first) == one.look([key], second) == [MISS]
    assert one.finish(False, [key], [0], first).success
    one.tier.on_request_finished(first)
    assert one.tier.lookup(key, second) is MISS, "the same answer throughout a request"
    one.tier.on_request_finished(second)
    assert one.look([key], ReqContext("c")) == [HIT]
    gone = ReqContext("gone")
    assert one.tier.lookup(keys(2)[0], gone) is RETRY
    one.tier.on_request_finished(gone)
    one.step()
    assert keys(2)[0] not in one.tier._verdicts


def test_nothing_blocks_while_services_hang(new_services: RealCluster, host: Callable[..., Host]) -> None:
    one, request = host(cluster=str(new_services.path), get_timeout=1, put_timeout=1), ReqContext("r")
    wanted = keys(*range(8))
    assert one.finish(False, wanted, list(range(8)), request).success
    services = [new_services.process(f"storage-{number}")["pid"] for number in (1, 2)]
    for service in services:
        os.kill(service, signal.SIGSTOP)
    try:
        start_s = time.monotonic()
        for key in wanted:
            one.tier.lookup(key, request)
        one.step()
        one.tier.touch(wanted, request)
        one.submit(True, wanted, list(range(8)), request)
        one.submit(False, keys(*range(20, 28)), list(range(8)), request)
        list(one.tier.get_finished_jobs())
        assert time.monotonic() - start_s < 0.3, "no call of the scheduler waits for storage"
        one.tier.drain_jobs()
        assert time.monotonic() - start_s < 10
        assert [result.success for result in one.tier.get_finished_jobs()] == [False, False]
        assert one.look(wanted, request) == [MISS] * 8
    finally:
        for service in services:
            os.kill(service, signal.SIGCONT)


def test_many_jobs_at_once_are_each_reported_once(host: Callable[..., Host]) -> None:
    one, request = host(threads=3), ReqContext("r")
    jobs = {one.submit(False, keys(number), [number % CHUNKS], request) for number in range(60)}
    seen: list[int] = []
    waiter = threading.Thread(target=one.tier.drain_jobs)
    waiter.start()
    while waiter.is_alive():
        seen += [result.job_id for result in one.tier.get_finished_jobs()]
    seen += [result.job_id for result in one.tier.get_finished_jobs()]
    assert sorted(seen) == sorted(jobs)
    assert one.look(keys(*range(60)), request) == [HIT] * 60


def test_blocks_count_as_used_in_the_order_of_the_prompt(host: Callable[..., Host], monkeypatch: pytest.MonkeyPatch) -> None:
    one, request = host(), ReqContext("r")
    wanted = keys(*range(6))
    for place, key in enumerate(wanted):
        request.set_offload_key_position(key, (place + 1) * 64)
    told: list[Any] = []
    for name in ("put", "get", "touch"):
        inner = getattr(one.tier._space, name)
        monkeypatch.setattr(one.tier._space, name, lambda keys, *rest, inner=inner: (told.append(keys), inner(keys, *rest))[1])
    shuffled = [wanted[place] for place in (3, 0, 5, 1, 4, 2)]
    assert one.finish(False, shuffled, list(range(6)), request).success and one.finish(True, shuffled, list(range(6)), request).success
    one.tier.touch(shuffled, request)
    one.look(keys(9), request)  # asked after the touch, in the same thread
    assert told == [wanted] * 3


def test_spaces_differ_where_bytes_would(host: Callable[..., Host]) -> None:
    names = {host(each).tier._space.name for each in (spec(), spec(2), spec(model="other"), spec(agnostic=True))}
    assert len(names) == 4
    assert host(spec(2, agnostic=True)).tier._space.name == host(spec(4, agnostic=True)).tier._space.name
    with pytest.raises(InvalidArgument, match="no setting 'mount'"):
        host(mount="/mnt/kvfs")


def test_metrics(host: Callable[..., Host]) -> None:
    one, request = host(locality="REMOTE"), ReqContext("r")
    assert one.finish(False, keys(1, 2), [0, 1], request).success and not one.finish(True, keys(1, 3), [0, 1], request).success
    stats = one.tier.get_stats()
    assert stats._values[BLOCKS_METRIC] == {("stored",): 2, ("hits",): 1, ("misses",): 1}
    assert one.tier.get_stats() is None
    assert list(KvfsTier.build_metric_definitions({})) == [BLOCKS_METRIC]
