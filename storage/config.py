"""Configuration of a storage process."""

from __future__ import annotations

import os
from dataclasses import dataclass

from kvfs.common.errors import ConfigError

_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class StorageConfig:
    data: tuple[str, ...] = ()
    """One directory per disk, in an order that never changes. The first also holds the node's identity."""
    listen: tuple[str, ...] = ("tcp://127.0.0.1:0",)
    """tcp and unix addresses; a unix address is what lets clients of this machine share memory."""
    cluster_id: str = ""
    """Empty: that of the manager."""
    managers: tuple[str, ...] = ("tcp://127.0.0.1:7001",)
    node_id: int = 0
    """A wished node id; 0: the manager gives one."""
    threads: int = 4
    """For disk work, shared by all disks."""
    inline_read_bytes: int = _MIB if (os.cpu_count() or 1) <= 4 else 0
    """Requests up to this are read without a thread if they are cached: on few cores the hop costs more than it brings. 0: only small ones are."""
    direct_reads: bool = True
    """Clients of this machine that run as this process's user, or as root, may read the data files themselves: they are told where bytes lie."""
    in_flight_bytes: int = 256 * _MIB
    """Bytes of client requests being worked on; more of them wait their turn."""
    buffer_bytes: int = 128 * _MIB
    """Memory for whole chunks on their way to a target that is being brought up to date."""
    forward_timeout_ms: int = 10_000
    """How long a forward may stay unanswered while the chain does not change."""
    give_up_ms: int = 60_000
    """How long an update is carried on after its sender has gone, before it waits for the next update or change of the chain."""
    resync_concurrency: int = 4
    """Batches of chunks on their way to a returning target."""
    resync_batch_bytes: int = 4 * _MIB
    target_capacity_bytes: int = 0
    """What one target may take of its disk; 0: what there is."""
    kv_high_watermark: float = 0.90
    """KV-cache blocks are evicted when a target of their chain is fuller than this share of its capacity ..."""
    kv_low_watermark: float = 0.85
    """... until it is no fuller than this."""
    scrub_interval_s: float = 7 * 86_400.0
    """Every stored byte of a target is read again so often, from pass to pass, against its checksum; 0: only when asked for."""
    scrub_bytes_per_s: int = 32 * _MIB
    """How fast, a disk: 2.7 TB a day. Where that is too slow for the interval, one pass follows another."""
    exit_when_lease_lost: bool = False
    """End the process half a lease after the last answer of a manager. Otherwise it stops serving then, and goes on if the manager still knows it."""

    def __post_init__(self) -> None:
        if len(set(self.data)) != len(self.data):
            raise ConfigError("storage.data names a directory twice: one per disk")
        if not self.listen:
            raise ConfigError("storage.listen is empty: give at least one address, e.g. tcp://0.0.0.0:7003")
        if not self.managers:
            raise ConfigError("storage.managers is empty: give the managers' addresses")
        if not 0 < self.kv_low_watermark < self.kv_high_watermark <= 1:
            raise ConfigError(
                f"storage.kv_low_watermark = {self.kv_low_watermark:g} and kv_high_watermark = {self.kv_high_watermark:g}: "
                "shares of the capacity, the low one under the high one"
            )
        if not (self.scrub_interval_s == 0 or 1 <= self.scrub_interval_s <= 3e8):
            raise ConfigError(f"storage.scrub_interval_s = {self.scrub_interval_s:g}: at least 1, or 0 for none")
        limits = (
            ("threads", 1, 256),
            ("scrub_bytes_per_s", 65_536, 1 << 40),
            ("inline_read_bytes", 0, 64 * _MIB),
            ("in_flight_bytes", 64 * _MIB, 1 << 40),
            ("buffer_bytes", 64 * _MIB, 1 << 40),
            ("forward_timeout_ms", 100, 600_000),
            ("give_up_ms", 100, 3_600_000),
            ("resync_concurrency", 1, 256),
            ("resync_batch_bytes", 65_536, 64 * _MIB),
        )
        for name, least, most in limits:
            if not least <= getattr(self, name) <= most:
                raise ConfigError(f"storage.{name} = {getattr(self, name)}: {least} to {most}")
