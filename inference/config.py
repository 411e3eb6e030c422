"""How an engine is set up. Owns `EngineConfig`; units are in the names. Loaded by common/config.py like every service's configuration."""

from __future__ import annotations

from dataclasses import dataclass

from kvfs.common.errors import InvalidArgument

DTYPES = ("fp32", "bf16")
CACHE_DTYPES = ("fp32", "bf16", "fp8")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    model: str = ""
    """Directory of the checkpoint, in Hugging Face's layout."""
    device: str = "cpu"
    """As torch names it: cpu, cuda, cuda:1."""
    dtype: str = "fp32"
    """Of weights and activations: fp32 or bf16."""
    cache_dtype: str = "fp32"
    """Of cached latents: fp32, bf16, or fp8 (FlashMLA's 656 bytes a token and layer)."""
    cache_pages: int = 512
    """Pages of 64 tokens in memory."""
    step_tokens: int = 512
    """Computed in one step at most: longer prompts are prefilled in chunks."""
    running_requests: int = 64
    """Decoded at once at most, and never more than step_tokens: each gets a token in every step."""
    waiting_requests: int = 256
    """More are refused (HTTP 429)."""
    threads: int = 1
    """torch's, on the CPU."""
    space: str = ""
    """Name of the KV-cache space; empty: one is named after the model's digest."""
    space_quota_bytes: int = 0
    """Of the space, if it is made here: beyond it the least recently used pages go. 0: up to the watermarks of the disks."""
    space_ttl_s: float = 0.0
    """The same: a page that nobody used for so long goes. 0: it stays."""
    disk_cache: bool = True
    write_queue_bytes: int = 256 << 20
    """Pages that wait to be written back; more are dropped, and counted."""
    read_timeout_s: float = 10.0
    """A prompt whose pages are not read by then is computed; sooner where computing takes less time."""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise InvalidArgument(f"dtype is {self.dtype!r}: {' or '.join(DTYPES)}")
        if self.cache_dtype not in CACHE_DTYPES:
            raise InvalidArgument(f"cache_dtype is {self.cache_dtype!r}: {', '.join(CACHE_DTYPES)}")
        for name in ("cache_pages", "step_tokens", "running_requests", "waiting_requests", "threads", "write_queue_bytes"):
            if getattr(self, name) < 1:
                raise InvalidArgument(f"{name} is {getattr(self, name)}: at least 1")
        for name in ("space_quota_bytes", "space_ttl_s"):
            if getattr(self, name) < 0:
                raise InvalidArgument(f"{name} is {getattr(self, name)}: not negative; 0 for none")
        if self.read_timeout_s <= 0:
            raise InvalidArgument(f"read_timeout_s is {self.read_timeout_s}: above 0")
