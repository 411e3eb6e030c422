"""The namespace's store as a whole: making the root, checking the format, numbers for inodes, places for files.

Invariants: an inode number is given out once, ever (a range of them is reserved by a commit before the first is used); a store of a newer format is
not touched.
"""

from __future__ import annotations

from collections.abc import Callable

from kvfs.common.boundary.random import Random, SeededRandom
from kvfs.common.errors import FormatTooNew, InvalidArgument, NoServingTarget
from kvfs.common.ids import ROOT_INODE
from kvfs.common.routing import Routing
from kvfs.common.wire import meta_pb2 as pb
from kvfs.meta.kv.engine import Engine
from kvfs.meta.kv.transaction import Transaction
from kvfs.meta.namespace import idempotency, keys, records

FIRST_INODE = 2
RESERVED_INODES = 65_536
CHUNK_BYTES = 1 << 20
STRIPE = 16
TABLE = 1


def prepare(txn: Transaction, now_ns: int, chunk_size_bytes: int = CHUNK_BYTES, *, uid: int = 0, gid: int = 0) -> bool:
    """Check the format, or make an empty file system whose root belongs to `uid` and `gid`. True: it was made now."""
    stored = txn.get(keys.FORMAT)
    if stored is not None:
        version = records.decode_number(stored)
        if version > records.FORMAT_VERSION:
            raise FormatTooNew(
                f"the metadata store has format {version}, this kvfs knows formats up to {records.FORMAT_VERSION}: upgrade it; nothing was touched"
            )
        idempotency.prepare(txn, now_ns)
        return False
    root = pb.Inode(inode=ROOT_INODE, type=pb.DIRECTORY, mode=0o755, nlink=2, parent=ROOT_INODE, uid=uid, gid=gid)
    root.atime_ns = root.mtime_ns = root.ctime_ns = root.birth_ns = now_ns
    root.layout.table_id = TABLE
    root.layout.chunk_size = chunk_size_bytes
    txn.set(keys.FORMAT, records.encode_number(records.FORMAT_VERSION))
    txn.set(keys.NEXT_INODE, records.encode_number(FIRST_INODE))
    idempotency.prepare(txn, now_ns)
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
    """Chooses the chains of a new file: the first by turns, so that small files spread evenly, the rest after it in the table from a random place
    on, so that the second and later chunks of files do too."""

    def __init__(self, routing: Callable[[], Routing], random: Random) -> None:
        self._routing = routing
        # Not an identifier: a quick generator does, seeded from the boundary.
        self._random = SeededRandom(random.randrange(1 << 62))
        self._cursor = self._random.randrange(1 << 16)
        self._version = -1
        self._tables: dict[int, list[int]] = {}

    def __call__(self, wanted: pb.Layout) -> pb.Layout:
        table_id = wanted.table_id or TABLE
        chains = self._chains(table_id)
        stripe = min(wanted.stripe or STRIPE, len(chains))
        start = self._cursor % len(chains)
        self._cursor += 1
        around = chains[start + 1 : start + stripe]
        around += chains[: stripe - 1 - len(around)]
        if around:  # turned by chance rather than shuffled: as even, and a tenth of the time
            turn = self._random.randrange(len(around))
            around = around[turn:] + around[:turn]
        return pb.Layout(table_id=table_id, chunk_size=wanted.chunk_size or CHUNK_BYTES, stripe=stripe, chain_ids=[chains[start], *around])

    def table(self, table_id: int, replication: int) -> tuple[int, int, list[int]]:
        """The chain table of a new KV-cache space, 0 for any: the first that fits."""
        replicas = {table.table_id: table.replicas for table in self._routing().tables}
        if table_id == 0:
            table_id = TABLE if not replication else min((number for number, count in replicas.items() if count == replication), default=0)
            if not table_id and replicas:
                raise InvalidArgument(f"there is no chain table of replication {replication}: there are {_listed(replicas)}")
        elif replicas and table_id not in replicas:
            raise InvalidArgument(f"there is no chain table {table_id}: there are {_listed(replicas)}")
        chains = self._chains(table_id)
        if replication not in (0, replicas[table_id]):
            raise InvalidArgument(f"chain table {table_id} has replication {replicas[table_id]}, not {replication}")
        return table_id, replicas[table_id], chains

    def _chains(self, table_id: int) -> list[int]:
        routing = self._routing()
        if routing.version != self._version:
            self._version = routing.version
            self._tables = {table.table_id: list(table.chain_ids) for table in routing.tables}
        chains = self._tables.get(table_id)
        if not chains:
            raise NoServingTarget(f"chain table {table_id} is not there yet: the cluster is starting, or has too few storage services")
        return chains


def _listed(replicas: dict[int, int]) -> str:
    return ", ".join(f"{number} (replication {count})" for number, count in sorted(replicas.items()))
