"""How a worker is set up. Owns `WorkerConfig`."""

from __future__ import annotations

from dataclasses import dataclass

from kvfs.common.errors import InvalidArgument
from kvfs.inference.config import EngineConfig

ROLES = ("both", "prefill", "decode")


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerConfig(EngineConfig):
    role: str = "both"
    """What a router gives it: prompts, answers, or both. It can do both."""
    listen: tuple[str, ...] = ("tcp://127.0.0.1:0",)
    cluster: str = ""
    """Of the disk cache: a directory of `kvfs up`, or addresses of managers."""
    drain_s: float = 3.0
    """For pages that wait to be written, when the worker is told to stop."""

    def __post_init__(self) -> None:
        EngineConfig.__post_init__(self)
        if self.role not in ROLES:
            raise InvalidArgument(f"role is {self.role!r}: {', '.join(ROLES)}")
        if not self.model:
            raise InvalidArgument("model is not set: name a checkpoint's directory")
        if self.disk_cache and not self.cluster:
            raise InvalidArgument("disk_cache needs a cluster: name one, or set disk_cache to false")
