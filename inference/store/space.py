"""The space that a model's pages live in: its parameters and its name.

Owns `page_space` and `space_name`. Invariants: everything that makes the bytes of a page differ (weights, the type they are computed in, type and
order of values, rope layout, tokens a page, the version of this code's format) is in the parameters, so that workers that would read each other's
pages wrongly are never in one space; two workers of one model are, whatever they are called and wherever their checkpoint lies. The name follows
from the parameters: a worker of another version, or set up otherwise, finds a space of its own and not one that it must refuse.
"""

from __future__ import annotations

import re

from kvfs.inference.cache.format import PAGE_TOKENS, PageFormat
from kvfs.kvcache import SpaceParams

SCHEMA = "1"
"""Of a page's bytes (cache/format.py). Grows when they change."""
LAYOUT = "layer-major"


def page_space(
    digest: bytes, format: PageFormat, rope: str, compute: str, *, quota_bytes: int | None = None, ttl_s: float | None = None
) -> SpaceParams:
    """`digest`: model/digest.py's. `rope`: config.ROPE_LAYOUT. `compute`: EngineConfig.dtype, since the same weights in another type give other
    latents."""
    return SpaceParams(
        block_tokens=PAGE_TOKENS,
        block_bytes=format.page_bytes,
        model=digest.hex(),
        dtype=format.dtype,
        layout=LAYOUT,
        rope=rope,
        extra={"compute": compute, "layers": str(format.layers), "row": f"{format.latent}+{format.rope}", "schema": SCHEMA},
        quota_bytes=quota_bytes,
        ttl_s=ttl_s,
    )


def space_name(model: str, params: SpaceParams) -> str:
    """Readable, and its own for each format of each model: DeepSeek-V3-bf16-1f0c9a5b7e21."""
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", model.rstrip("/").rpartition("/")[2]).strip("-.")[:100] or "model"
    return f"{readable}-{params.dtype}-{params.digest.hex()[:12]}"
