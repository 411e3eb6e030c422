"""The pages of one worker's memory, as tensors for the model and as buffers for the store.

Owns `PagePool`. Invariants: a page in memory has exactly the bytes it has on disk (cache/format.py), so on the CPU the store reads and writes pages
where they lie, in registered memory, without a copy; a row is written before it is read, and rows behind a request's length never reach a result
(what a failed read left there may be anything). Who holds a page is cache/pages.py's business.
On a GPU the pool is in the GPU's memory, and `buffer` is not there: the store goes through `to_host` and `from_host`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvfs.common.errors import InvalidArgument
from kvfs.inference.cache.format import FP8_TILE, PAGE_TOKENS, PageFormat
from kvfs.kvcache import BlockBuffers

_E4M3_MAX = 448.0
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.uint8}


class PagePool:
    def __init__(self, format: PageFormat, pages: int, *, device: str = "cpu", compute: torch.dtype = torch.float32) -> None:
        """`compute`: the type of the rows that come out."""
        if pages < 1:
            raise InvalidArgument(f"a pool of {pages} pages: at least one")
        self.format = format
        self.pages = pages
        self.device = torch.device(device)
        self._compute = compute
        self._buffers: BlockBuffers | None = None
        if self.device.type == "cpu":
            self._buffers = BlockBuffers(pages, format.page_bytes)
            stride = self._buffers.stride
            memory = torch.frombuffer(self._buffers.memory.view, dtype=torch.uint8)[: pages * stride]
        else:
            stride = format.page_bytes
            memory = torch.zeros(pages * stride, dtype=torch.uint8, device=self.device)
        self._bytes = memory.view(pages, stride)
        dtype = _DTYPES[format.dtype]
        size = dtype.itemsize
        width = format.row_bytes // size
        self._rows = memory.view(dtype).as_strided((pages, format.layers, PAGE_TOKENS, width), (stride // size, format.layer_bytes // size, width, 1))
        """[pages, layers, PAGE_TOKENS, row]"""

    def write(self, layer: int, slots: tuple[torch.Tensor, torch.Tensor], latent: torch.Tensor, rope: torch.Tensor) -> None:
        """Rows of one layer: latent [T, latent], rope [T, rope], into slots: pages [T], and places in them [T]."""
        pages, places = slots
        if self.format.dtype == "fp8":
            rows = pack_fp8(latent, rope)
        else:
            rows = torch.cat([latent, rope], dim=-1).to(self._rows.dtype)
        self._rows[pages, layer, places] = rows

    def gather(self, layer: int, pages: torch.Tensor, length: int) -> torch.Tensor:
        """The first `length` rows of a request that lies in pages [n]: [length, latent + rope]."""
        return self._unpacked(self._copied(layer, pages).view(-1, self._rows.shape[-1])[:length])

    def gather_padded(self, layer: int, pages: torch.Tensor, longest: int, padding: torch.Tensor | None) -> torch.Tensor:
        """The rows of several requests that lie in pages [requests, n]: [requests, longest, latent + rope]. `padding`: rows, counted through all the
        pages, that are behind a request's end. They come out as zeros."""
        rows = self._unpacked(self._copied(layer, pages.flatten()).view(len(pages), -1, self._rows.shape[-1]))
        if padding is not None:
            rows.flatten(0, 1).index_fill_(0, padding, 0)
        return rows[:, :longest]

    def _copied(self, layer: int, pages: torch.Tensor) -> torch.Tensor:
        """[pages, layer's bytes as values]: page by page (index_select), not value by value as an index does."""
        return self._rows[:, layer].flatten(1).index_select(0, pages)

    def _unpacked(self, rows: torch.Tensor) -> torch.Tensor:
        if self.format.dtype == "fp8":
            return unpack_fp8(rows, self.format).to(self._compute)
        return rows.to(self._compute)

    # --- the store's side --------------------------------------------------------------------------------------------------------------

    def buffer(self, page: int) -> memoryview:
        """The bytes of a page in registered memory. On the CPU only."""
        if self._buffers is None:
            raise InvalidArgument(f"the pages are on {self.device}: a page is copied to the host before it is stored")
        return self._buffers[page]

    def restore(self, pages: Sequence[int]) -> None:
        """These are about to be read into. Memory that an earlier reading had to take out of a service's reach is within it again, where that is
        safe."""
        if self._buffers is not None:
            for page in pages:
                self._buffers.restore(page)

    def to_host(self, pages: Sequence[int]) -> torch.Tensor:
        """A copy of pages in the host's memory: [pages, page_bytes] uint8."""
        return self._bytes[torch.tensor(pages, device=self.device), : self.format.page_bytes].to("cpu")

    def from_host(self, pages: Sequence[int], content: torch.Tensor, start: int = 0) -> None:
        """Bytes [pages, n] uint8 into pages, from byte `start` of each."""
        self._bytes[torch.tensor(pages, device=self.device), start : start + content.shape[1]] = content.to(self.device)

    def clear_tail(self, page: int, tokens: int) -> None:
        """Zeros behind the first `tokens` rows of every layer: what is stored of an unfinished page holds nothing of an earlier owner."""
        self._rows[page, :, tokens:] = 0

    def close(self) -> None:
        if self._buffers is not None:
            self._buffers.close()


def pack_fp8(latent: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
    """[T, latent], [T, rope] -> [T, row_bytes] uint8: e4m3 values, one fp32 scale for each 128 of them (2 ** ceil(log2(max(amax / 448, 1e-4)))), bf16
    rope part (FlashMLA's "fp8 with scale")."""
    count, width = latent.shape
    tiles = -(-width // FP8_TILE)
    padded = torch.nn.functional.pad(latent.float(), (0, tiles * FP8_TILE - width)).view(count, tiles, FP8_TILE)
    scale = torch.exp2(torch.ceil(torch.log2((padded.abs().amax(-1) / _E4M3_MAX).clamp_min(1e-4))))
    values = (padded / scale[..., None]).to(torch.float8_e4m3fn).view(torch.uint8).flatten(1)[:, :width]
    return torch.cat([values, scale.contiguous().view(torch.uint8), rope.to(torch.bfloat16).contiguous().view(torch.uint8)], dim=-1)


def unpack_fp8(rows: torch.Tensor, format: PageFormat) -> torch.Tensor:
    """[..., row_bytes] uint8 -> [..., latent + rope] fp32"""
    values, scales, rope = rows.split([format.latent, 4 * format.tiles, 2 * format.rope], dim=-1)
    scale = scales.contiguous().view(torch.float32).repeat_interleave(FP8_TILE, -1)[..., : format.latent]
    latent = values.contiguous().view(torch.float8_e4m3fn).float() * scale
    return torch.cat([latent, rope.contiguous().view(torch.bfloat16).float()], dim=-1)
