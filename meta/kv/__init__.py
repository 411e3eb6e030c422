"""The transactional key-value store under all metadata: one interface with FoundationDB's semantics, and its engines.

engine.py       Engine and Snapshot: what an engine must offer; limits; the retry loop
transaction.py  Transaction: read-your-writes and conflict tracking, the same over every engine
writes.py       the pending writes of one transaction
conflicts.py    pure core: does a transaction conflict with what was committed since its snapshot
versions.py     pure core: recent versions of recently written keys
local.py        what the engines of one process share: snapshots, commit order, waiting for durability
memory.py       nothing on disk (tests, simulation)
lmdb_engine.py  LMDB with a write-ahead journal and group commit (journal.py, base.py)
"""

from kvfs.meta.kv.engine import Engine
from kvfs.meta.kv.open import open_engine
from kvfs.meta.kv.transaction import Transaction

__all__ = ["Engine", "Transaction", "open_engine"]
