"""The namespace's store as a whole: making the root, checking the format, numbers for inodes, places for files.

Invariants: an inode number is given out once, ever (a range of them is reserved by a commit before the first is used); a store of a newer format is
not touched.
"""

from __future__ import annotations

from collections.abc import Callable

from kvfs.common.boundary.random import Random
from kvfs.common.errors import FormatTooNew, NoServingTarget
from kvfs.common.ids import ROOT_INODE
from kvfs.common.routing import Routing
from kvfs.common.wire import meta_pb2 as pb
from kvfs.meta.kv.engine import Engine
from kvfs.meta.kv.transaction import Transaction
from kvfs.meta.namespace import keys, records

FIRST_INODE = 2
RESERVED_INODES = 65_536
CHUNK_BYTES = 1 << 20
STRIPE = 16
TABLE = 1


def prepare(txn: Transaction, now_ns: int) -> bool:
    """Check the format, or make an empty file system. True: it was made now."""
    stored = txn.get(keys.FORMAT)
    if stored is not None:
        version = records.decode_number(stored)
        if version > records.FORMAT_VERSION:
            raise FormatTooNew(
                f"the metadata store has format {version}, this kvfs knows formats up to {records.FORMAT_VERSION}: upgrade it; nothing was touched"
            )
        return False
    root = pb.Inode(inode=ROOT_INODE, type=pb.DIRECTORY, mode=0o755, nlink=2, parent=ROOT_INODE)
    root.atime_ns = root.mtime_ns = root.ctime_ns = root.birth_ns = now_ns
    root.layout.table_id = TABLE
    root.layout.chunk_size = CHUNK_BYTES
    txn.set(keys.FORMAT, records.encode_number(records.FORMAT_VERSION))
    txn.set(keys.NEXT_INODE, records.encode_number(FIRST_INODE))
    txn.set(keys.inode(ROOT_INODE), records.encode_inode(root))
    txn.set(keys.directory_links(ROOT_INODE), records.encode_links(2))
    return True


def reserve(txn: Transaction, count: int) -> int:
    """Reserve `count` inode numbers; the first of them."""
    stored = txn.get(keys.NEXT_INODE)
    first = records.decode_number(stored) if stored is not None else FIRST_INODE
    txn.set(keys.NEXT_INODE, records.encode_number(first + count))
    return first


class InodeNumbers:
    """Hands out reserved numbers. `ensure` before an operation that may need one; numbers of lost attempts are not used again."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._next = 0
        self._end = 0

    def next(self) -> int:
        assert self._next < self._end, "ensure() comes before an operation that makes an inode"
        number = self._next
        self._next += 1
        return number

    def short(self) -> bool:
        return self._end - self._next < 1000

    async def ensure(self) -> None:
        """Several callers may reserve at once: each takes a range of its own, and only what is left of the older one is wasted."""
        if self.short():
            first = await self._engine.transact(lambda txn: reserve(txn, RESERVED_INODES))
            if first >= self._end:
                self._next, self._end = first, first + RESERVED_INODES


class Placement:
    """Chooses the chains of a new file: the next ones of the table, round-robin, so that files spread evenly, and shuffled, so that the first chunks
    of files do too."""

    def __init__(self, routing: Callable[[], Routing], random: Random) -> None:
        self._routing = routing
        self._random = random
        self._cursor = random.randrange(1 << 16)

    def __call__(self, wanted: pb.Layout) -> pb.Layout:
        table_id = wanted.table_id or TABLE
        routing = self._routing()
        if not routing.has_table(table_id):
            raise NoServingTarget(f"chain table {table_id} is not there yet: the cluster is starting, or has too few storage services")
        chains = list(routing.table(table_id).chain_ids)
        stripe = min(wanted.stripe or STRIPE, len(chains))
        if stripe == 0:
            raise NoServingTarget(f"chain table {table_id} has no chains")
        start = self._cursor % len(chains)
        self._cursor += stripe
        chosen = [chains[(start + place) % len(chains)] for place in range(stripe)]
        self._random.shuffle(chosen)
        return pb.Layout(table_id=table_id, chunk_size=wanted.chunk_size or CHUNK_BYTES, stripe=stripe, chain_ids=chosen)
