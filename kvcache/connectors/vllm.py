"""vLLM's tiered offloading (0.33.0) on kvfs: a secondary tier behind the host's memory.

    --kv-transfer-config '{"kv_connector":"OffloadingConnector","kv_role":"kv_both","kv_connector_extra_config":{"spec_name":"TieringOffloadingSpec",
      "cpu_bytes_to_use":...,"secondary_tiers":[{"type":"KvfsTier","module_path":"kvfs.kvcache.connectors.vllm","cluster":"..."}]}}'

Owns lookups and transfers between vLLM's primary tier and a space. Invariants:
  - one chunk of the primary tier is one block, sent from and read into its place there;
  - nothing blocks the scheduler: lookups of a step are asked together at its end, in a thread, and answer RETRY until then; jobs run in threads;
  - every job that was submitted is reported once, and after `drain_jobs` nobody touches the primary tier's memory;
  - a verdict holds for the requests that asked; a load that fails makes it a miss, or the scheduler would ask for that load for ever;
  - trouble with storage is a miss, or a job that failed.
vLLM calls under one lock, not always from the same thread.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, ClassVar

from kvfs.kvcache.connectors.common import Connection, EngineSpace, Settings, block_key, engine_class, log

THREADS = 8
COUNTED = ("stored", "present", "refused", "hits", "misses", "late", "corrupt")
"""Of the space's counters, what vLLM is told."""
BLOCKS_METRIC = "vllm:kv_offload_kvfs_blocks"

if TYPE_CHECKING:

    class SecondaryTierManager:
        """What is used of vLLM's abstract class."""

        tier_type: str
        locality: Any

        def __init__(self, offloading_spec: Any, primary_kv_view: memoryview, tier_type: str, backpressure_detector: Any = None) -> None: ...

else:
    SecondaryTierManager = engine_class("vllm.v1.kv_offload.tiering.base", "SecondaryTierManager")


@dataclass(slots=True)
class _Verdict:
    there: bool | None = None
    """None: not known yet."""
    requests: set[str] = field(default_factory=set)


class KvfsTier(SecondaryTierManager):
    """Built by vLLM's SecondaryTierFactory in the scheduler's process; the settings of common.Settings, and `threads`, are keys of the tier."""

    medium: ClassVar[Any] = getattr(engine_class("vllm.v1.kv_offload.base", "Medium"), "STORAGE", None)

    def __init__(
        self,
        offloading_spec: Any,
        primary_kv_view: memoryview,
        tier_type: str,
        backpressure_detector: Any = None,
        locality: str | None = None,
        threads: int = THREADS,
        **settings: Any,
    ) -> None:
        super().__init__(offloading_spec, primary_kv_view, tier_type, backpressure_detector)
        from vllm.v1.kv_offload.base import Locality, LookupResult, RequestOffloadingContext
        from vllm.v1.kv_offload.tiering.base import JobResult

        self.locality = None if locality is None else Locality(locality)
        self._hit, self._miss, self._retry = LookupResult.HIT, LookupResult.MISS, LookupResult.RETRY
        self._job_result: Callable[..., Any] = JobResult
        self._request_context: Callable[[], Any] = RequestOffloadingContext
        assert primary_kv_view.strides is not None
        self._chunk_bytes = primary_kv_view.strides[0]
        self._memory = primary_kv_view.cast("B")
        self._connection = Connection(Settings.read(settings), "vllm")
        self._space = _space(self._connection, offloading_spec, self._chunk_bytes)
        self._verdicts: dict[bytes, _Verdict] = {}
        self._asked: dict[str, set[bytes]] = {}
        self._batch: list[bytes] = []
        self._answers: SimpleQueue[list[tuple[bytes, bool]]] = SimpleQueue()
        self._results: SimpleQueue[tuple[Any, list[bytes]]] = SimpleQueue()
        """Finished jobs, with the keys of chunks that could not be loaded."""
        self._jobs = 0
        self._idle = threading.Condition()
        self._asker = ThreadPoolExecutor(1, thread_name_prefix="kvfs-vllm-lookup")
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="kvfs-vllm")
        self._told = dict.fromkeys(COUNTED, 0)
        log.info("vLLM's chunks are kept in /kvcache/%s", self._space.name)

    # --- lookups ---------------------------------------------------------------------------------------------------------------------------------

    def on_new_request(self, req_context: Any) -> Any:
        return self._request_context()

    def lookup(self, key: bytes, req_context: Any) -> Any:
        self._hear()
        verdict = self._verdicts.get(key)
        if verdict is None:
            verdict = self._verdicts[key] = _Verdict()
            self._batch.append(key)
        verdict.requests.add(req_context.req_id)
        self._asked.setdefault(req_context.req_id, set()).add(key)
        return self._retry if verdict.there is None else self._hit if verdict.there else self._miss

    def on_schedule_end(self, context: Any) -> None:
        """Ask for all that was looked up in this step."""
        self._hear()
        batch = [key for key in self._batch if key in self._verdicts]
        self._batch = []
        if batch:
            self._asker.submit(self._ask, batch)

    def _ask(self, keys: list[bytes]) -> None:
        found = [False] * len(keys)
        try:
            found = self._space.exists(_keys(keys))
        except Exception:
            log.exception("a lookup failed: all of it is a miss")
        self._answers.put(list(zip(keys, found, strict=True)))

    def _hear(self) -> None:
        while True:
            try:
                answers = self._answers.get_nowait()
            except Empty:
                return
            for key, there in answers:
                verdict = self._verdicts.get(key)
                if verdict is not None and verdict.there is None:
                    verdict.there = there

    def on_request_finished(self, req_context: Any) -> None:
        for key in self._asked.pop(req_context.req_id, ()):
            verdict = self._verdicts[key]
            verdict.requests.discard(req_context.req_id)
            if not verdict.requests:
                del self._verdicts[key]

    def touch(self, keys: Collection[bytes], req_context: Any) -> None:
        self._asker.submit(self._space.touch, _keys(_in_order(list(keys), req_context)))

    # --- transfers -------------------------------------------------------------------------------------------------------------------------------

    def submit_store(self, job_metadata: Any) -> None:
        self._submit(job_metadata, self._space.put, loading=False)

    def submit_load(self, job_metadata: Any) -> None:
        self._submit(job_metadata, self._space.get, loading=True)

    def _submit(self, job: Any, transfer: Callable[..., list[bool]], *, loading: bool) -> None:
        with self._idle:
            self._jobs += 1
        self._threads.submit(self._run, job, transfer, loading)

    def _run(self, job: Any, transfer: Callable[..., list[bool]], loading: bool) -> None:
        start_s = time.monotonic()
        keys: list[bytes] = list(job.keys)
        done = [False] * len(keys)
        try:
            # In the order of the prompt, so that of what is touched together its beginning goes last.
            order = _in_order(list(zip(keys, job.chunk_ids, strict=True)), job.req_context, key=lambda pair: pair[0])
            results = transfer(_keys([key for key, _ in order]), [[self._chunk(chunk_id)] for _, chunk_id in order])
            there = {key: result for (key, _), result in zip(order, results, strict=True)}
            done = [there[key] for key in keys]
        except Exception:
            log.exception("job %s of %d chunks failed", job.job_id, len(keys))
        missing = [key for key, result in zip(keys, done, strict=True) if not result]
        some = tuple(key for key, result in zip(keys, done, strict=True) if result) if missing and loading else None
        result = self._job_result(
            job_id=job.job_id,
            success=not missing,
            successful_keys=some or None,
            transfer_time=time.monotonic() - start_s,
            transfer_bytes=len(keys) * self._chunk_bytes,
        )
        self._results.put((result, missing if loading else []))
        with self._idle:
            self._jobs -= 1
            self._idle.notify_all()

    def _chunk(self, chunk_id: Any) -> memoryview:
        start = int(chunk_id) * self._chunk_bytes
        return self._memory[start : start + self._chunk_bytes]

    def get_finished_jobs(self) -> Iterable[Any]:
        finished: list[Any] = []
        while True:
            try:
                result, missing = self._results.get_nowait()
            except Empty:
                return finished
            finished.append(result)
            for key in missing:
                verdict = self._verdicts.get(key)
                if verdict is not None and verdict.there:
                    verdict.there = False

    def drain_jobs(self) -> None:
        """Every job has a deadline, so this has an end."""
        with self._idle:
            self._idle.wait_for(lambda: self._jobs == 0)

    # --- the rest --------------------------------------------------------------------------------------------------------------------------------

    def shutdown(self) -> None:
        self._asker.shutdown(cancel_futures=True)
        self._threads.shutdown()
        self._memory.release()
        self._space.close()
        self._connection.close()

    @classmethod
    def build_metric_definitions(cls, extra_config: dict[str, Any]) -> dict[str, Any]:
        from vllm.v1.kv_offload.base import OffloadingCounterMetadata

        return {BLOCKS_METRIC: OffloadingCounterMetadata(documentation="Blocks of the kvfs tier by what became of them.", labelnames=("outcome",))}

    def get_stats(self) -> Any:
        """What became of blocks since the last call. vLLM itself counts bytes, times and failed jobs of every tier."""
        from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import OffloadingConnectorStats

        stats = OffloadingConnectorStats()
        counters = self._space.space.counters
        for name in COUNTED:
            now = getattr(counters, name)
            if now > self._told[name]:
                stats.increase_counter(BLOCKS_METRIC, now - self._told[name], (name,))
            self._told[name] = now
        return None if stats.is_empty() else stats


def _keys(keys: Sequence[bytes]) -> list[bytes]:
    return [block_key(bytes(key)) for key in keys]


def _in_order(items: list[Any], req_context: Any, key: Callable[[Any], bytes] = lambda item: item) -> list[Any]:
    """By their places in the prompt, where vLLM knows them."""
    position = getattr(req_context, "get_offload_key_position", lambda _: None)
    return sorted(items, key=lambda item: position(key(item)) or 0)


def _space(connection: Connection, offloading_spec: Any, chunk_bytes: int) -> EngineSpace:
    """The space of chunks of this model in this form. As vLLM's own file tier: parallelism counts unless the bytes do not depend on it."""
    config = offloading_spec.config
    parallel = config.parallel
    groups = [{"tokens_per_block": group.tokens_per_block, "layer_names": list(group.layer_names)} for group in config.groups]
    extra = {
        "groups": hashlib.blake2b(json.dumps(groups, sort_keys=True).encode(), digest_size=16).hexdigest(),
        "hash_tokens": str(config.cache.tokens_per_hash),
        "chunk_blocks": str(config.cache.blocks_per_chunk),
        "parallel": "any"
        if parallel.is_parallelism_agnostic or config.replicated_layout
        else f"tp{parallel.tp_size}.pp{parallel.pp_size}.pcp{parallel.pcp_size}.dcp{parallel.dcp_size}.r{parallel.rank}",
    }
    if config.replicated_layout:
        extra["replicated"] = "yes"
    if config.canonical_layout:
        from vllm.distributed.kv_transfer.kv_connector.v1.offloading.canonical_mapping import canonical_format_id

        extra["canonical"] = str(canonical_format_id(config.kv_cache_layout))
    tokens = max((group.tokens_per_block for group in config.groups), default=1) * config.cache.blocks_per_chunk
    return connection.space(
        config.model.name,
        f"c{tokens}.{extra['parallel']}",
        block_tokens=tokens,
        block_bytes=chunk_bytes,
        dtype=str(config.model.dtype),
        layout=config.kv_cache_layout or "",
        extra=extra,
    )
