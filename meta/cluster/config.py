"""Configuration of a manager process."""

from __future__ import annotations

from dataclasses import dataclass

from kvfs.common.errors import ConfigError


@dataclass(frozen=True, slots=True)
class ManagerConfig:
    data: str = ""
    """Directory of this manager: its identity, its lock and, by default, the cluster's records."""
    listen: tuple[str, ...] = ("tcp://127.0.0.1:7001",)
    grpc_listen: str = ""
    """"host:port" for administration over gRPC; empty: none."""
    cluster_id: str = ""
    """Empty: that of the store, or a new one when the store is new."""
    kv: str = ""
    """Where the records are: "lmdb:/path", "memory"; empty: lmdb in the data directory."""
    lease_ms: int = 2000
    """A node that is silent this long is dead. Nodes send four heartbeats in it and stop serving after half of it."""
    client_lease_ms: int = 15_000
    """A client that is silent this long is off the list, and its open files are closed for it."""
    primary_lease_ms: int = 10_000
    """A primary manager that is silent this long is succeeded by a standby."""

    def __post_init__(self) -> None:
        for name, least, most in (("lease_ms", 100, 600_000), ("client_lease_ms", 1000, 3_600_000), ("primary_lease_ms", 500, 600_000)):
            if not least <= getattr(self, name) <= most:
                raise ConfigError(f"manager.{name} = {getattr(self, name)}: {least} to {most}")
        if not self.listen:
            raise ConfigError("manager.listen is empty: give at least one address, e.g. tcp://127.0.0.1:7001")
