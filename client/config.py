"""Settings of a client: time limits, memory limits, how far it reads ahead and writes behind.

Owns `ClientConfig`, the one place where a limit of the client has its default. Every queue and buffer of the client is bounded by one of these.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvfs.common.errors import ConfigError

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class ClientConfig:
    """What a client may use and how long it tries."""

    deadline_s: float = 30.0
    """How long an operation tries, over all retries, before it fails with DeadlineExceeded. A chain needs up to two leases (4 s) to drop a
    dead target."""
    meta_attempt_s: float = 10.0
    """One attempt at the metadata service."""
    read_attempt_s: float = 2.0
    """One attempt to read from one replica; then the next replica is asked. It doubles with each round over all replicas."""
    write_attempt_s: float = 6.0
    """One attempt to write; it doubles with each retry. More than two leases, so that the head can wait out the death of a successor."""
    backoff_first_s: float = 0.01
    backoff_max_s: float = 0.5
    suspect_s: float = 1.0
    """A storage node that lost a connection is asked last for so long."""

    buffer_pool_bytes: int = 256 * MIB
    """Registered memory, sparse: only what is touched is taken from the machine."""
    dirty_max_bytes: int = 32 * MIB
    """Written but not yet acknowledged bytes of all files together; writers wait above it."""
    dirty_age_s: float = 0.5
    """Buffered bytes older than this are sent without being asked."""
    length_hint_s: float = 5.0
    """While a file is written, others hear of its length so often; 0: only at fsync and close."""
    write_batch_bytes: int = 4 * MIB
    """Whole chunks gathered into one request."""
    write_ahead_bytes: int = 8 * MIB
    """Of one sequential writer on their way, while it fills the next: more only takes fresh memory, which costs more than the writing (a millisecond
    a MiB), unless a file is spread over many nodes."""
    writes_in_flight: int = 4
    """Write requests under way to a node at once, all files together; each carries a batch."""
    session_end_s: float = 0.02
    """The end of a file that was closed with nothing to report waits so long for another request to travel with."""
    channels: int = 512
    """Idempotency channels: writes under way at once."""

    read_ahead_bytes: int = 16 * MIB
    """How far a sequential reader is kept ahead, at most; 0 turns read-ahead off."""
    read_ahead_first_bytes: int = 1 * MIB
    read_window_bytes: int = 4 * MIB
    """One read-ahead request; several are under way."""
    read_ahead_total_bytes: int = 128 * MIB
    """All files' read-ahead together."""
    batch_max_ios: int = 256
    """Chunk reads or writes in one request."""
    batch_max_bytes: int = 32 * MIB

    shared_memory: bool = True
    """Bytes to and from services on this machine go through shared memory. False: through sockets, as to any other machine."""
    watch: bool = True
    """Follow the metadata service's revocations. Without it nothing is cached beyond one call."""
    watch_wait_ms: int = 20_000
    client_heartbeat: bool = True
    """Tell the manager that this client lives: without it write sessions are taken for dead ones."""

    def __post_init__(self) -> None:
        waits = ("backoff_first_s", "backoff_max_s", "dirty_age_s", "session_end_s")
        for name in ("deadline_s", "meta_attempt_s", "read_attempt_s", "write_attempt_s", *waits):
            if getattr(self, name) <= 0:
                raise ConfigError(f"client.{name} must be above 0")
        for name in ("buffer_pool_bytes", "dirty_max_bytes", "write_batch_bytes", "write_ahead_bytes", "read_window_bytes", "batch_max_bytes"):
            if getattr(self, name) < MIB:
                raise ConfigError(f"client.{name} must be at least 1 MiB")
        for name in ("writes_in_flight", "channels", "batch_max_ios"):
            if getattr(self, name) < 1:
                raise ConfigError(f"client.{name} must be at least 1")
        if self.length_hint_s < 0:
            raise ConfigError("client.length_hint_s must not be negative")
        if self.read_ahead_bytes < 0 or self.read_ahead_total_bytes < 0:
            raise ConfigError("client.read_ahead_bytes must not be negative")
        if self.batch_max_ios > self.channels:
            raise ConfigError(f"client.batch_max_ios ({self.batch_max_ios}) must not be above client.channels ({self.channels})")
