"""KV-cache spaces: directories whose inode holds blocks instead of entries.

Owns what a space is at the metadata service: its limits, its chains, and its end. Invariants: a space's inode number has SPACE_BIT set and is
never used again (it is the space's epoch); its chains are fixed when it is made; it has no entries; it goes by one transaction, and its inode only
after its blocks were removed on all its chains twice, the second time when no client can put any more. It is never asked about a single block.
"""

from __future__ import annotations

from kvfs.common.errors import InvalidArgument
from kvfs.common.wire import meta_pb2 as pb
from kvfs.meta.namespace import records
from kvfs.meta.namespace.step import Step

BLOCK_BYTES_MAX = 64 << 20
DIGEST_BYTES = 16
FORMAT_FIELDS_MAX = 64
FORMAT_BYTES_MAX = 4096
"""Of one name or value."""
SPACE_GRACE_NS = 30 * 10**9
"""Between the two removals of a dropped space's blocks. A client trusts its handle of a space for 10 s and lets no put go on beyond 25 s."""


def new_space(step: Step, wanted: pb.Space) -> pb.Space:
    """The record of a new space: what was asked for, checked, with the chains of its table."""
    if not 1 <= wanted.block_bytes <= BLOCK_BYTES_MAX:
        raise InvalidArgument(f"blocks of {wanted.block_bytes} bytes: 1 to {BLOCK_BYTES_MAX}")
    if wanted.block_tokens < 1:
        raise InvalidArgument("a block holds at least one token")
    if len(wanted.digest) != DIGEST_BYTES:
        raise InvalidArgument(f"a namespace digest of {len(wanted.digest)} bytes: it has {DIGEST_BYTES}")
    if len(wanted.format) > FORMAT_FIELDS_MAX or any(len(text) > FORMAT_BYTES_MAX for pair in wanted.format.items() for text in pair):
        raise InvalidArgument(f"a format of at most {FORMAT_FIELDS_MAX} fields, names and values of at most {FORMAT_BYTES_MAX} characters")
    space = pb.Space()
    space.CopyFrom(wanted)
    space.table_id, space.replication, chains = step.around.table(wanted.table_id, wanted.replication)
    if wanted.quota_bytes and wanted.quota_bytes < wanted.block_bytes * len(chains):
        raise InvalidArgument(
            f"a quota of {wanted.quota_bytes} bytes: the space lies on {len(chains)} chains, and each needs room for a block of {wanted.block_bytes}"
        )
    del space.chain_ids[:]
    space.chain_ids.extend(chains)
    space.version = 1
    return space


def drop_space(step: Step, space: pb.Inode) -> pb.Inode:
    """The space is gone for everyone who looks; its blocks go in the background, beginning now. Its entry and its parent's links are the caller's."""
    space.nlink = 0
    space.ctime_ns = step.now_ns
    step.put(space)
    step.discard(space.inode, records.SPACE_GARBAGE, delay_ns=0)
    return space
