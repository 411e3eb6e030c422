"""Configuration of the meta service."""

from __future__ import annotations

from dataclasses import dataclass

from kvfs.common.errors import ConfigError

CHUNK_SIZES = tuple(1 << shift for shift in range(16, 27))


@dataclass(frozen=True, slots=True)
class MetaConfig:
    data: str = ""
    """Directory of this service: node.json and, with the default engine, the metadata store."""
    cluster_id: str = ""
    """Empty: the cluster of the managers."""
    managers: tuple[str, ...] = ("tcp://127.0.0.1:7001",)
    listen: tuple[str, ...] = ("tcp://127.0.0.1:0",)
    grpc_listen: str = ""
    """host:port for the gRPC face; empty: none."""
    kv: str = ""
    """The store: 'memory' or 'lmdb:/path'; empty: lmdb:<data>/kv."""
    chunk_size_bytes: int = 1 << 20
    """Of new files of a new file system: a power of two from 64 KiB to 64 MiB. One that exists keeps its own."""
    root_uid: int = 0
    root_gid: int = 0
    """Who owns the root directory of a new file system. `kvfs up` names the user who called it."""
    attr_lease_ms: int = 1000
    """How long a client that watches may trust attributes without asking; 0: not at all."""
    gc_delay_s: float = 2.0
    """How long a removed file's chunks stay."""
    prune_grace_s: float = 10.0
    """How long a client must be missing from the manager's list before its open files are closed for it."""

    def __post_init__(self) -> None:
        if not self.managers:
            raise ConfigError("managers: the address of at least one manager is needed")
        if self.chunk_size_bytes not in CHUNK_SIZES:
            raise ConfigError(f"chunk_size_bytes = {self.chunk_size_bytes}: a power of two from 65536 to 67108864")
        if not 0 <= self.attr_lease_ms <= 60_000:
            raise ConfigError(f"attr_lease_ms = {self.attr_lease_ms}: from 0 to 60000")
        if not (0 <= self.root_uid < 1 << 32 and 0 <= self.root_gid < 1 << 32):
            raise ConfigError("root_uid and root_gid are numbers of a user and a group, from 0 to 4294967295")
        if self.gc_delay_s < 0 or self.prune_grace_s < 0:
            raise ConfigError("gc_delay_s and prune_grace_s cannot be negative")

    @property
    def kv_url(self) -> str:
        return self.kv or f"lmdb:{self.data}/kv"
