"""What the tests of the LMDB engine put into it, and all that it holds."""

from __future__ import annotations

from kvfs.meta.kv.lmdb_engine import LmdbEngine


def put(key: bytes, value: bytes = b"v"):
    return lambda txn: txn.set(key, value)


async def everything(engine: LmdbEngine) -> dict[bytes, bytes]:
    rows, more = await engine.transact(lambda txn: txn.get_range(b"", b"\xff"))
    assert not more
    return dict(rows)
