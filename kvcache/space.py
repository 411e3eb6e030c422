"""A space for threads.

Owns nothing but the way into the client's thread: each batch crosses once there and once back at most, keys of prompts and blocks are hashed, blocks
on this machine are read, and a lone one is put there, in the calling thread.
Invariants and arguments are async_space's. After a fork the child opens the space anew, by its name, at its first call.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any

from kvfs.client.sync_client import Client
from kvfs.common.errors import StaleHandle
from kvfs.kvcache import keys as hashing
from kvfs.kvcache.async_space import AsyncSpace, Key
from kvfs.kvcache.buffers import BlockBuffers
from kvfs.kvcache.gets import Batch
from kvfs.kvcache.keys import Tokens
from kvfs.kvcache.outcomes import Put, SpaceCounters, SpaceStats
from kvfs.kvcache.params import SpaceParams
from kvfs.kvcache.parcels import hash_registered

if TYPE_CHECKING:
    from kvfs.kvcache.cache import AsyncKVCache


class Space:
    """Made by KVCache.create and open."""

    def __init__(self, run: Callable[[Callable[[AsyncKVCache], Awaitable[AsyncSpace]]], AsyncSpace], client: Client, space: AsyncSpace) -> None:
        self._open = run
        self._client = client
        self._space = space
        self._pid = os.getpid()

    def _handle(self) -> AsyncSpace:
        if self._pid != os.getpid():
            mine, name = self._space.inode, self._space.name
            space = self._open(lambda cache: cache.open(name))
            if space.inode != mine:
                raise StaleHandle(f"space {name} was dropped, and another made under its name: open it")
            self._space, self._pid = space, os.getpid()
        return self._space

    @property
    def name(self) -> str:
        return self._space.name

    @property
    def inode(self) -> int:
        return self._space.inode

    @property
    def params(self) -> SpaceParams:
        return self._space.params

    @property
    def block_bytes(self) -> int:
        return self._space.block_bytes

    @property
    def block_tokens(self) -> int:
        return self._space.block_tokens

    @property
    def counters(self) -> SpaceCounters:
        return self._space.counters

    @property
    def dropped(self) -> bool:
        return self._space.dropped

    def keys(self, tokens: Tokens, salt: bytes = b"") -> list[Key]:
        return hashing.chain(tokens, self._space.block_tokens, salt=salt)

    def buffers(self, count: int) -> BlockBuffers:
        return self._space.buffers(count)

    def match(self, tokens: Tokens, salt: bytes = b"", *, deadline_s: float | None = None) -> int:
        return self.match_keys(self.keys(tokens, salt), deadline_s=deadline_s) * self._space.block_tokens

    def match_keys(self, keys: Sequence[Key], *, deadline_s: float | None = None) -> int:
        space = self._handle()
        return self._client.portal.call(lambda: space.match_keys(keys, deadline_s=deadline_s))

    def exists(self, keys: Sequence[Key], *, deadline_s: float | None = None) -> list[bool]:
        space = self._handle()
        return self._client.portal.call(lambda: space.exists(keys, deadline_s=deadline_s))

    def get(self, keys: Sequence[Key], into: Sequence[Any], *, shorter: bool = False, deadline_s: float | None = None) -> list[int | None]:
        space = self._handle()
        return self._get(space, space.begin_get(keys, into, shorter, deadline_s))

    def get_range(self, keys: Sequence[Key], offset: int, length: int, into: Sequence[Any], *, deadline_s: float | None = None) -> list[int | None]:
        space = self._handle()
        return self._get(space, space.begin_range(keys, offset, length, into, deadline_s))

    def _get(self, space: AsyncSpace, batch: Batch) -> list[int | None]:
        """The bytes that lie on this machine are read in this thread; for the rest, and for where they lie, it crosses into the client's."""
        gets = space.gets
        gets.take_known(batch)
        if batch.pending:
            self._client.portal.call(gets.find, batch)
        if batch.placed:
            gets.read(batch)
        if batch.pending:
            self._client.portal.call(gets.fetch, batch)
        return gets.finish(batch)

    def put(self, keys: Sequence[Key], blocks: Sequence[Any], prefix: Sequence[Key] = (), *, deadline_s: float | None = None) -> list[Put]:
        space = self._handle()
        parcels = space.parcels(keys, blocks)
        portal = self._client.portal
        if len(keys) == 1 and not portal.inside:
            used = [*hashing.digests(prefix), *hashing.digests(keys)]
            result, deadline_s = space.alone.put(used[-1], parcels[0], space.put_limit_s(deadline_s))
            if result is not None:
                if prefix or result is Put.PRESENT:  # one new block was touched when it was stored: there is no order to tell
                    portal.post(space.touch, used)
                return [result]
        hash_registered(parcels)
        return portal.call(space.put_parcels, keys, parcels, prefix, deadline_s)

    def touch(self, keys: Sequence[Key]) -> None:
        self._client.portal.call(self._handle().touch, keys)

    def remove(self, keys: Sequence[Key], *, deadline_s: float | None = None) -> list[bool]:
        space = self._handle()
        return self._client.portal.call(lambda: space.remove(keys, deadline_s=deadline_s))

    def evict(self, blocks: int) -> int:
        return self._client.portal.call(self._handle().evict, blocks)

    def stats(self) -> SpaceStats:
        return self._client.portal.call(self._handle().stats)
