"""Where a block lies: a chain computed from its digest, the same for every client, with no one to ask.

Rendezvous hashing over 65,536 buckets. Invariants: a digest's bucket is XXH3-64(digest) mod 65,536; a bucket's chain is the one whose
XXH3-64(bucket (2 bytes little-endian) || chain id (4 bytes little-endian)) is highest; so chains share the buckets evenly. The chains of a space
never change, so a block's place never does. This module must never do I/O.
"""

from __future__ import annotations

from collections.abc import Sequence

from xxhash import xxh3_64_intdigest

from kvfs.common.errors import InputOutput

BUCKETS = 1 << 16
_MASK = BUCKETS - 1


class BlockPlacement:
    __slots__ = ("_chains", "_known", "chain_ids")

    def __init__(self, chain_ids: Sequence[int]) -> None:
        if not chain_ids:
            raise InputOutput("the space has no chains: its record is damaged")
        self.chain_ids = tuple(chain_ids)
        self._chains = [(chain, chain.to_bytes(4, "little")) for chain in self.chain_ids]
        self._known: dict[int, int] = {}
        """Bucket -> chain, filled as they are asked for."""

    def chain(self, digest: bytes) -> int:
        bucket = xxh3_64_intdigest(digest) & _MASK
        known = self._known.get(bucket)
        return self._place(bucket) if known is None else known

    def group(self, digests: Sequence[bytes]) -> dict[int, list[int]]:
        """Chain -> the places of its digests, in order."""
        if len(self.chain_ids) == 1:
            places = list(range(len(digests)))
            return {self.chain_ids[0]: places} if places else {}
        groups: dict[int, list[int]] = {}
        known = self._known.get
        for place, digest in enumerate(digests):
            bucket = xxh3_64_intdigest(digest) & _MASK
            chain = known(bucket)
            if chain is None:
                chain = self._place(bucket)
            members = groups.get(chain)
            if members is None:
                groups[chain] = [place]
            else:
                members.append(place)
        return groups

    def _place(self, bucket: int) -> int:
        prefix = bucket.to_bytes(2, "little")
        chain: int = max((xxh3_64_intdigest(prefix + raw), chain) for chain, raw in self._chains)[1]
        self._known[bucket] = chain
        return chain
