"""A KV cache of a client for threads, over a real cluster that runs in a thread of the test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.unit.client.test_sync import client, cluster

from kvfs.client import Client
from kvfs.kvcache import KVCache

__all__ = ["client", "cluster"]


@pytest.fixture
def cache(client: Client) -> Iterator[KVCache]:
    made = KVCache(client)
    yield made
    for name in made.list():
        made.drop(name)
