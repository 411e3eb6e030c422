"""Settings of a KV-cache client: deadlines, how long a handle is trusted, when a chain that does not answer is left alone.

Owns `CacheConfig`, the one place where they have their defaults. What concerns chunks in general is client/config.py's.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvfs.common.errors import ConfigError

HANDLE_LIFE_S = 25.0
"""No put goes on longer than this after its space was last seen to be there: the metadata service removes a dropped space's blocks for the last time
30 s after the drop (meta/namespace/spaces.py), and what is put after that would stay for ever."""


@dataclass(frozen=True, slots=True)
class CacheConfig:
    get_deadline_s: float = 5.0
    """For exists, match, get and get_range: what has not answered by then is a miss."""
    put_deadline_s: float = 10.0
    """For put and remove. A chain needs up to two leases (4 s) to drop a dead target."""
    trust_s: float = 10.0
    """How long a handle of a space is used without asking whether the space is still there."""
    refresh_s: float = 5.0
    """After so long it is asked in the background, so that a handle in use never has to wait."""
    check_s: float = 0.5
    """How long an operation waits for that answer. Reads go on without it: a dropped space's blocks are what they were."""
    rest_s: float = 2.0
    """A chain that let a deadline pass is left alone for so long (twice as long each time), and everything on it is a miss at once."""
    rest_max_s: float = 30.0
    trial_s: float = 0.5
    """The deadline of the first operation after that."""

    def __post_init__(self) -> None:
        for name in ("get_deadline_s", "put_deadline_s", "trust_s", "refresh_s", "check_s", "trial_s"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"kvcache.{name} must be above 0")
        if self.rest_s < 0 or self.rest_max_s < self.rest_s:
            raise ConfigError("kvcache.rest_s must not be negative, and kvcache.rest_max_s not below it")
        if self.trust_s >= HANDLE_LIFE_S:
            raise ConfigError(f"kvcache.trust_s must be below {HANDLE_LIFE_S:g}: later a put could outlive its space")
