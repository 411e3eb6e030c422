"""What the connectors share: settings, an engine's spaces, memory at raw addresses, blocks that lie in several pieces.

Owns the way from an engine's configuration to open spaces, and from the engine's memory to what a space takes. Invariants:
  - blocks of different formats never meet in one space: its name ends in the namespace digest;
  - no call raises for trouble with storage, and none lasts much longer than its deadline;
  - a space that somebody drops while an engine runs is made anew;
  - staging memory is bounded, and who holds some never waits for more.
Nothing here knows an engine. Any thread may call anything.
"""

from __future__ import annotations

import ctypes
import importlib
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, TypeVar

from kvfs.client import Client
from kvfs.common.errors import InvalidArgument, KvfsError
from kvfs.kvcache.buffers import BlockBuffers
from kvfs.kvcache.cache import KVCache
from kvfs.kvcache.config import CacheConfig
from kvfs.kvcache.params import SpaceParams
from kvfs.kvcache.space import Space

log = logging.getLogger("kvfs.kvcache.connectors")

T = TypeVar("T")
Pieces = Sequence[Any]
"""The memory of one block, in order: buffers whose concatenation is the block."""

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", re.IGNORECASE)
_FACTORS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
RENEW_GAP_S = 1.0
STAGING_BYTES = 64 << 20
_DEFAULTS = CacheConfig()


def engine_class(module: str, name: str) -> Any:
    """The engine's class to inherit from; `object` where the engine is not installed, so that the connector can be read and tested without it.

    An engine that is installed but broken says so itself."""
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise
        return object


@dataclass(frozen=True, slots=True)
class Settings:
    """What a user may set for every engine. How the names are written in the engine's own configuration is the connector's matter."""

    cluster: str | None = None
    """Directory of a `kvfs up` cluster, or addresses of managers; None: $KVFS_CLUSTER."""
    space: str = ""
    """Beginning of the names of the spaces; empty: the model's name."""
    quota_bytes: int | None = None
    """Of each space. Counts when a space is made; so do the next three."""
    ttl_s: float | None = None
    replicas: int = 0
    table: int = 0
    get_timeout_s: float = _DEFAULTS.get_deadline_s
    put_timeout_s: float = _DEFAULTS.put_deadline_s
    staging_bytes: int = STAGING_BYTES
    """Registered memory for blocks that do not lie in one piece."""

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> Settings:
        """From the engine's values, by the names of NAMES. InvalidArgument names the one that is wrong."""
        for name in given:
            if name not in NAMES:
                raise InvalidArgument(f"kvfs has no setting {name!r}: there are {', '.join(NAMES)}")
        values = {NAMES[name][0]: _read(name, value) for name, value in given.items() if value is not None}
        return cls(**values)


def _size(value: Any) -> int:
    found = _SIZE.fullmatch(str(value).strip())
    if found is None:
        raise ValueError("a size is a number, or one with K, M, G or T behind it")
    return int(float(found[1]) * _FACTORS[found[2].upper()])


NAMES: dict[str, tuple[str, Any]] = {
    "cluster": ("cluster", str),
    "space": ("space", str),
    "quota": ("quota_bytes", _size),
    "ttl": ("ttl_s", float),
    "replicas": ("replicas", int),
    "table": ("table", int),
    "get_timeout": ("get_timeout_s", float),
    "put_timeout": ("put_timeout_s", float),
    "staging": ("staging_bytes", _size),
}
"""Setting -> field and type."""


def _read(name: str, value: Any) -> Any:
    try:
        return NAMES[name][1](value)
    except (TypeError, ValueError) as error:
        raise InvalidArgument(f"the setting {name} is {value!r}: {error}") from None


def block_key(name: str | bytes) -> bytes:
    """The key of a block that the engine names so: 64 hex digits are what they say, anything else is hashed."""
    if isinstance(name, str):
        if len(name) == 64:
            try:
                return bytes.fromhex(name)
            except ValueError:
                pass
        name = name.encode()
    elif 16 <= len(name) <= 64:
        return bytes(name)
    return blake2b(name, digest_size=32, person=b"kvfs-engine-key").digest()


def memory_at(address: int, size: int) -> memoryview:
    """The engine's memory there. The caller knows that it lives as long as the view."""
    return memoryview((ctypes.c_ubyte * size).from_address(address)).cast("B")


class Connection:
    """A client of the cluster and the spaces that an engine uses."""

    def __init__(self, settings: Settings, engine: str) -> None:
        self.settings = settings
        self._engine = engine
        self._client = Client(settings.cluster, description=f"{engine} connector")
        self._cache = KVCache(self._client, CacheConfig(get_deadline_s=settings.get_timeout_s, put_deadline_s=settings.put_timeout_s))

    def space(self, model: str, part: str, *, block_tokens: int, block_bytes: int, dtype: str, layout: str, extra: Mapping[str, str]) -> EngineSpace:
        """The space of such blocks, made if it is not there. `part` is for people: what `kvfs kv ls` shows beside the model's name."""
        params = SpaceParams(
            block_tokens=block_tokens,
            block_bytes=block_bytes,
            model=model,
            dtype=dtype,
            layout=layout,
            extra={"engine": self._engine, **extra},
            replication=self.settings.replicas,
            table=self.settings.table,
            quota_bytes=self.settings.quota_bytes,
            ttl_s=self.settings.ttl_s,
        )
        beginning = _plain(self.settings.space or f"{self._engine}-{model}")[:150]
        return EngineSpace(self._cache, f"{beginning}.{_plain(part)[:80]}.{params.digest.hex()[:12]}", params, self.settings)

    def close(self) -> None:
        self._client.close()


def _plain(text: str) -> str:
    """For a name: without slashes, and not hidden."""
    return re.sub(r"[^\w.+=@,-]", "_", text).lstrip(".") or "space"


class EngineSpace:
    """A space, and the ways of an engine into it. Trouble is a miss and a line in the log."""

    def __init__(self, cache: KVCache, name: str, params: SpaceParams, settings: Settings) -> None:
        self.name = name
        self.params = params
        self.block_bytes = params.block_bytes
        self._cache = cache
        self._lock = threading.Lock()
        self._renewed_s = time.monotonic()
        self._space = cache.create(name, params, exist_ok=True)
        self._get_s = settings.get_timeout_s
        self._put_s = settings.put_timeout_s
        self._staging = Staging(params.block_bytes, settings.staging_bytes)

    @property
    def space(self) -> Space:
        """The open space: made anew if it was dropped."""
        if self._space.dropped:
            with self._lock:
                now_s = time.monotonic()
                if self._space.dropped and now_s - self._renewed_s >= RENEW_GAP_S:
                    self._renewed_s = now_s
                    self._reopen()
        return self._space

    def clear(self) -> None:
        """Drop all blocks, at once and for everyone."""
        with self._lock:
            try:
                self._cache.drop(self.name)
            except (KvfsError, OSError) as error:  # somebody else was faster, or may do it
                log.warning("space %s is not dropped: %s", self.name, error)
            self._reopen()

    def _reopen(self) -> None:
        try:
            self._space = self._cache.create(self.name, self.params, exist_ok=True)
        except (KvfsError, OSError) as error:
            log.warning("space %s cannot be made anew, everything in it is a miss: %s", self.name, error)

    def close(self) -> None:
        self._staging.close()

    # --- what engines do --------------------------------------------------------------------------------------------------------------------

    def match(self, keys: Sequence[bytes], prefix: Sequence[bytes] = ()) -> int:
        """How many of these keys are there without a gap. They and their prefix count as used."""
        try:
            found = self.space.match_keys(keys)
            if prefix and found:
                self.space.touch(prefix)
            return found
        except (KvfsError, OSError) as error:
            return _trouble("look up", error, 0)

    def exists(self, keys: Sequence[bytes]) -> list[bool]:
        try:
            return self.space.exists(keys)
        except (KvfsError, OSError) as error:
            return _trouble("look up", error, [False] * len(keys))

    def touch(self, keys: Sequence[bytes]) -> None:
        try:
            self.space.touch(keys)
        except (KvfsError, OSError) as error:
            _trouble("touch", error, None)

    def remove(self, keys: Sequence[bytes]) -> list[bool]:
        try:
            return self.space.remove(keys)
        except (KvfsError, OSError) as error:
            return _trouble("remove", error, [False] * len(keys))

    def put(self, keys: Sequence[bytes], blocks: Sequence[Pieces], prefix: Sequence[bytes] = ()) -> list[bool]:
        """Whether each block is there now. A block in one piece is sent from where it lies, others are put together in staging memory first."""
        try:
            if all(len(pieces) == 1 for pieces in blocks):
                return [bool(result) for result in self.space.put(keys, [pieces[0] for pieces in blocks], prefix)]
            return self._put_pieces(keys, blocks, prefix)
        except (KvfsError, OSError) as error:
            return _trouble("put", error, [False] * len(keys))

    def _put_pieces(self, keys: Sequence[bytes], blocks: Sequence[Pieces], prefix: Sequence[bytes]) -> list[bool]:
        space, end_s = self.space, time.monotonic() + self._put_s
        there = space.exists(keys)  # what is there need not be put together
        missing = [place for place, present in enumerate(there) if not present]
        while missing:
            with self._staging.lend(len(missing)) as slots:
                now, missing = missing[: len(slots)], missing[len(slots) :]
                for place, slot in zip(now, slots, strict=True):
                    start = 0
                    for piece in blocks[place]:
                        view = memoryview(piece).cast("B")
                        slot[start : start + len(view)] = view
                        start += len(view)
                sent = [slot[: sum(memoryview(piece).nbytes for piece in blocks[place])] for place, slot in zip(now, slots, strict=True)]
                results = space.put([keys[place] for place in now], sent, deadline_s=_left(end_s))
                for place, result in zip(now, results, strict=True):
                    there[place] = bool(result)
        space.touch([*prefix, *(key for key, present in zip(keys, there, strict=True) if present)])
        return there

    def get(self, keys: Sequence[bytes], into: Sequence[Pieces]) -> list[bool]:
        """Read blocks into their pieces; True where the block is there and has exactly their length. After a False their content is unspecified."""
        if all(len(pieces) == 1 for pieces in into):
            views = [memoryview(pieces[0]).cast("B") for pieces in into]
            return [length == len(view) for length, view in zip(self.get_whole(keys, views), views, strict=True)]
        hits = [False] * len(keys)

        def take(place: int, block: memoryview) -> None:
            hits[place] = _scatter(block, into[place])

        self.get_staged(keys, take)
        return hits

    def get_whole(self, keys: Sequence[bytes], into: Sequence[Any]) -> list[int | None]:
        """Read blocks straight into where they belong: how long each is, None for a miss and for one that is longer than its buffer."""
        try:
            return self.space.get(keys, into, shorter=True)
        except (KvfsError, OSError) as error:
            return _trouble("get", error, [None] * len(keys))

    def get_staged(self, keys: Sequence[bytes], take: Callable[[int, memoryview], None]) -> None:
        """Read blocks into staging memory and show each that is there, with its place; the view is good during the call."""
        try:
            space, end_s = self.space, time.monotonic() + self._get_s
            start = 0
            while start < len(keys):
                with self._staging.lend(len(keys) - start) as slots:
                    found = space.get(keys[start : start + len(slots)], slots, deadline_s=_left(end_s))
                    for place, (length, slot) in enumerate(zip(found, slots, strict=True), start):
                        if length is not None:
                            take(place, slot[:length])
                    start += len(slots)
        except (KvfsError, OSError) as error:
            _trouble("get", error, None)


def _scatter(block: memoryview, pieces: Pieces) -> bool:
    views = [memoryview(piece).cast("B") for piece in pieces]
    if len(block) != sum(map(len, views)):
        return False
    start = 0
    for view in views:
        view[:] = block[start : start + len(view)]
        start += len(view)
    return True


def _left(end_s: float) -> float:
    """Of an operation in several rounds."""
    return max(0.0, end_s - time.monotonic())


def _trouble(what: str, error: Exception, answer: T) -> T:
    log.warning("kvfs could not %s: %s", what, error)
    return answer


class Staging:
    """Registered memory for blocks that lie in pieces, made at its first use, lent in turns."""

    def __init__(self, block_bytes: int, size_bytes: int) -> None:
        self._block_bytes = block_bytes
        self._count = max(1, size_bytes // block_bytes)
        self._buffers: BlockBuffers | None = None
        self._free: list[int] = list(range(self._count))
        self._returned = threading.Condition()

    @contextmanager
    def lend(self, want: int) -> Iterator[list[memoryview]]:
        """Some blocks of memory, at least one and at most so many. Who waits does so for a holder's one operation, which has a deadline."""
        with self._returned:
            if self._buffers is None:
                self._buffers = BlockBuffers(self._count, self._block_bytes)
            buffers = self._buffers
            self._returned.wait_for(lambda: self._free)
            taken = [self._free.pop() for _ in range(min(want, len(self._free)))]
        try:
            yield [buffers[place] for place in taken]
        finally:
            with self._returned:
                self._free += taken
                self._returned.notify()

    def close(self) -> None:
        with self._returned:
            if self._buffers is not None:
                self._buffers.close()
                self._buffers = None
