"""Memory of blocks: whatever the caller has, as flat bytes, and as a span that services may touch where it is registered memory.

Owns the way from the caller's objects (bytes-like objects, numpy arrays, torch tensors, spans, `BlockBuffers`) to what a request may name.
Invariants: a buffer that a get may fill is writable, contiguous and large enough, or the call is refused before anything is sent; a service writes
into registered memory directly only where that memory could be taken from it again (whole pages of one block), so that a service that answers too
late never writes into memory that its owner uses for something else. Everything else goes through the channel's own memory, for one copy.
torch and numpy are imported only by who asks for their views.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

from kvfs.client.file.memory import PAGE_BYTES, RegisteredBuffer, registered_at
from kvfs.common.errors import InvalidArgument, OutOfRange, ReadOnly
from kvfs.common.transport.region import Span

DIRECT_BYTES_MIN = 4096
"""Less is copied sooner than its address is looked up."""


@dataclass(slots=True)
class Memory:
    """One buffer: its bytes, and the span of them that services on this host may touch, where there is one."""

    view: memoryview
    span: Span | None = None
    owner: RegisteredBuffer | None = None

    def part(self, length: int) -> Span | memoryview:
        """What a request names for the first `length` bytes."""
        if self.span is not None:
            return self.span if length == self.span.length else self.span.part(0, length)
        return self.view[:length]

    def settle(self) -> None:
        """Nobody but this process touches the bytes from now on."""
        if self.span is not None and self.span.pinned and self.owner is not None:
            self.owner.forsake(self.span)


def to_fill(buffer: Any, place: int, need_bytes: int) -> Memory:
    """A buffer that a block is to be read into. `need_bytes`: it must hold so many."""
    memory = _memory(buffer, f"buffer {place}", direct=True)
    if memory.view.readonly:
        raise ReadOnly(f"buffer {place} is read-only: a block cannot be read into it")
    if len(memory.view) < need_bytes:
        raise OutOfRange(f"buffer {place} has {len(memory.view)} bytes, and {need_bytes} are needed")
    return memory


def to_send(buffer: Any, place: int) -> Memory:
    """A block that is to be put."""
    return _memory(buffer, f"block {place}", direct=False)


def _memory(buffer: Any, what: str, *, direct: bool) -> Memory:
    if isinstance(buffer, RegisteredBuffer):
        buffer = buffer.span()
    if isinstance(buffer, Span):
        # A bare span is looked up by its address too: a get takes one only where it can be forsaken.
        view = buffer.view
    elif hasattr(buffer, "data_ptr"):
        view = _tensor(buffer, what)
    else:
        try:
            view = memoryview(buffer)
        except TypeError:
            raise InvalidArgument(f"{what} is a {type(buffer).__name__}: it must be a bytes-like object, a numpy array or a torch tensor") from None
        if not view.c_contiguous:
            raise InvalidArgument(f"{what} is not contiguous")
        if view.format != "B" or view.ndim != 1:
            view = view.cast("B")
    length = len(view)
    if view.readonly or length < DIRECT_BYTES_MIN:
        return Memory(view)
    found = registered_at(ctypes.addressof(ctypes.c_ubyte.from_buffer(view)), length)
    if found is None:
        return Memory(view)
    owner, offset = found
    span = owner.direct(offset, length)
    if span is None and not direct and not owner.forsaken(offset, length):
        span = owner.span(offset, length)  # a service only reads it
    return Memory(view, span, owner)


def _tensor(tensor: Any, what: str) -> memoryview:
    """The bytes of a torch tensor of any type, without a copy and without torch."""
    if tensor.device.type != "cpu":
        raise InvalidArgument(f"{what} is a tensor on {tensor.device}: copy it to the host first")
    if not tensor.is_contiguous():
        raise InvalidArgument(f"{what} is not contiguous")
    size = tensor.numel() * tensor.element_size()
    anchor = (ctypes.c_ubyte * size).from_address(tensor.data_ptr())
    anchor.tensor = tensor  # keeps its memory while the view lives
    return memoryview(anchor).cast("B")


class BlockBuffers:
    """Registered memory for `count` blocks, each on pages of its own, so that services on this host move blocks in and out of it directly.

    A sequence of writable memoryviews; `numpy` and `torch` give typed views of one block. Closed, it is no longer registered; views stay valid."""

    def __init__(self, count: int, block_bytes: int) -> None:
        if count < 1 or block_bytes < 1:
            raise InvalidArgument(f"{count} buffers of {block_bytes} bytes: at least one of each")
        self.block_bytes = block_bytes
        self.stride = -(-block_bytes // PAGE_BYTES) * PAGE_BYTES
        self.memory = RegisteredBuffer(count * self.stride, exclusive_pages=True)
        self._views = [self.memory.view[start : start + block_bytes] for start in range(0, count * self.stride, self.stride)]

    def __len__(self) -> int:
        return len(self._views)

    def __getitem__(self, place: int) -> memoryview:
        return self._views[place]

    def numpy(self, place: int, dtype: Any = "uint8", shape: Any = -1) -> Any:
        """A numpy array over one block."""
        import numpy

        return numpy.frombuffer(self._views[place], dtype=dtype).reshape(shape)

    def torch(self, place: int, dtype: Any = None, shape: Any = -1) -> Any:
        """A torch tensor over one block."""
        import torch

        return torch.frombuffer(self._views[place], dtype=dtype or torch.uint8).reshape(shape)

    def close(self) -> None:
        self._views.clear()
        self.memory.close()

    def __enter__(self) -> BlockBuffers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
