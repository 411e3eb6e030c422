"""What a space is: the parameters it is made with, its namespace digest, and how a space found is told from the one asked for.

Owns `SpaceParams` and its translation to and from the stored record (meta.proto's Space). Invariants: blocks of two spaces with the same namespace
digest are interchangeable, of two with different ones never; retention (quota, time to live) and placement (table, replication) are no part of it.
The digest is BLAKE2b-16, person "kvfs-space", over the JSON text {"block_bytes":N,"block_tokens":N,"format":{...}} in UTF-8, names sorted, without
blanks (docs/format.md has a worked example). This module must never do I/O.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import blake2b

from kvfs.common.errors import InvalidArgument, SpaceDiffers
from kvfs.common.wire import meta_pb2 as pb

BLOCK_BYTES_MAX = 64 << 20
BLOCK_TOKENS_MAX = (1 << 32) - 1
QUOTA_BYTES_MAX = 1 << 62
TTL_S_MAX = 10**9
"""Thirty years."""
TABLE_MAX = 65535
REPLICATION_MAX = 3
OWN_FIELDS = ("model", "dtype", "layout", "rope")


@dataclass(frozen=True, slots=True, kw_only=True)
class SpaceParams:
    """The format fields (model, dtype, layout, rope and `extra`) are free text; empty ones are left out."""

    block_tokens: int
    """Tokens whose cache one block holds."""
    block_bytes: int
    """A block has at most so many; shorter ones are allowed."""
    model: str = ""
    dtype: str = ""
    layout: str = ""
    rope: str = ""
    extra: Mapping[str, str] = field(default_factory=dict)
    """Further format fields: tensor-parallel rank, schema version, whatever makes blocks differ."""
    replication: int = 0
    """1 to 3; 0: that of the chain table."""
    table: int = 0
    """Chain table; 0: the first of that replication."""
    quota_bytes: int | None = None
    """Of block contents, all chains together, replicas not counted. None: up to the watermarks of the targets."""
    ttl_s: float | None = None
    """A block that was not touched for so long goes. None: it stays."""

    def __post_init__(self) -> None:
        for number in ("block_bytes", "block_tokens", "replication", "table", "quota_bytes"):
            value = getattr(self, number)
            if not isinstance(value, int) and not (value is None and number == "quota_bytes"):
                raise InvalidArgument(f"{number} is {value!r}: a whole number is needed")
        if not 1 <= self.block_bytes <= BLOCK_BYTES_MAX:
            raise InvalidArgument(f"block_bytes is {self.block_bytes}: 1 to {BLOCK_BYTES_MAX}")
        if not 1 <= self.block_tokens <= BLOCK_TOKENS_MAX:
            raise InvalidArgument(f"block_tokens is {self.block_tokens}: 1 to {BLOCK_TOKENS_MAX}")
        if not 0 <= self.replication <= REPLICATION_MAX:
            raise InvalidArgument(f"replication is {self.replication}: 1 to {REPLICATION_MAX}, or 0 for the table's")
        if self.quota_bytes is not None and self.quota_bytes <= 0:
            raise InvalidArgument(f"quota_bytes is {self.quota_bytes}: a space without room holds nothing; None for no quota")
        if self.quota_bytes is not None and self.quota_bytes > QUOTA_BYTES_MAX:
            raise InvalidArgument(f"quota_bytes is {self.quota_bytes}: at most {QUOTA_BYTES_MAX}; None for no quota")
        if not 0 <= self.table <= TABLE_MAX:
            raise InvalidArgument(f"table is {self.table}: 1 to {TABLE_MAX}, or 0 for the first of that replication")
        if self.ttl_s is not None and not (isinstance(self.ttl_s, int | float) and 0.001 <= self.ttl_s <= TTL_S_MAX):
            raise InvalidArgument(f"ttl_s is {self.ttl_s}: 0.001 to {TTL_S_MAX}; None for no time to live")
        for name, value in (*((name, getattr(self, name)) for name in OWN_FIELDS), *self.extra.items()):
            if not _is_text(name) or not _is_text(value):
                raise InvalidArgument(f"the format field {name!r} is {value!r}: format fields are text")
        for name in self.extra:
            if name in OWN_FIELDS or name in ("block_tokens", "block_bytes") or not name:
                raise InvalidArgument(f"an extra format field cannot be called {name!r}")

    @property
    def format(self) -> dict[str, str]:
        """All format fields that are not empty."""
        own = {name: getattr(self, name) for name in OWN_FIELDS}
        return {name: value for name, value in sorted({**own, **self.extra}.items()) if value}

    @property
    def digest(self) -> bytes:
        """The namespace digest."""
        return namespace_digest(self.block_tokens, self.block_bytes, self.format)

    def to_wire(self) -> pb.Space:
        return pb.Space(
            block_tokens=self.block_tokens,
            block_bytes=self.block_bytes,
            replication=self.replication,
            table_id=self.table,
            quota_bytes=self.quota_bytes or 0,
            ttl_ms=round((self.ttl_s or 0) * 1000),
            format=self.format,
            digest=self.digest,
        )

    @classmethod
    def from_wire(cls, space: pb.Space) -> SpaceParams:
        """Of a stored space: with the table and replication that the service chose."""
        stored = dict(space.format)
        return cls(
            block_tokens=space.block_tokens,
            block_bytes=space.block_bytes,
            **{name: stored.pop(name, "") for name in OWN_FIELDS},
            extra=stored,
            replication=space.replication,
            table=space.table_id,
            quota_bytes=space.quota_bytes or None,
            ttl_s=space.ttl_ms / 1000 if space.ttl_ms else None,
        )

    def check_same(self, name: str, stored: pb.Space) -> None:
        """SpaceDiffers unless the stored space holds blocks of this format. The message names the first field that differs, and both values."""
        here: dict[str, object] = {"block_tokens": self.block_tokens, "block_bytes": self.block_bytes, **self.format}
        there: dict[str, object] = {"block_tokens": stored.block_tokens, "block_bytes": stored.block_bytes, **stored.format}
        for field_name in (*here, *(extra for extra in sorted(there) if extra not in here)):
            if here.get(field_name) != there.get(field_name):
                raise SpaceDiffers(
                    f"space {name} has another format: {field_name} is {there.get(field_name)!r} there, {here.get(field_name)!r} was asked for"
                )


def _is_text(value: object) -> bool:
    """Unicode that has a form in UTF-8: a command line may bring something else along."""
    return isinstance(value, str) and not any("\ud800" <= letter <= "\udfff" for letter in value)


def namespace_digest(block_tokens: int, block_bytes: int, format: Mapping[str, str]) -> bytes:
    canonical = json.dumps(
        {"block_bytes": block_bytes, "block_tokens": block_tokens, "format": dict(format)}, sort_keys=True, separators=(",", ":"), ensure_ascii=False
    )
    return blake2b(canonical.encode(), digest_size=16, person=b"kvfs-space").digest()
