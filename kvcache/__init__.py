"""KV-cache spaces and blocks: the cache of large language models' attention, kept by prefix.

`KVCache` over `kvfs.client.Client` is for threads, `AsyncKVCache` over an AsyncClient for trio. A space holds the blocks of one model in one format;
keys are chained hashes of tokens (`keys`); blocks go straight to the storage services and back, and no metadata service is asked about them.
"""

from kvfs.kvcache.async_space import AsyncSpace
from kvfs.kvcache.buffers import BlockBuffers
from kvfs.kvcache.cache import AsyncKVCache, KVCache
from kvfs.kvcache.config import CacheConfig
from kvfs.kvcache.outcomes import Put, SpaceCounters, SpaceStats
from kvfs.kvcache.params import SpaceParams
from kvfs.kvcache.space import Space

__all__ = [
    "AsyncKVCache",
    "AsyncSpace",
    "BlockBuffers",
    "CacheConfig",
    "KVCache",
    "Put",
    "Space",
    "SpaceCounters",
    "SpaceParams",
    "SpaceStats",
]
