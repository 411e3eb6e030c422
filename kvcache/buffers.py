"""Memory of blocks: whatever the caller has, as flat bytes, and as a span that services may touch where it is registered memory.

Owns the way from the caller's objects (bytes-like objects, numpy arrays, torch tensors, spans, `BlockBuffers`) to what a request may name.
Invariants: a buffer that a get may fill is writable, contiguous and large enough, or the call is refused before anything is sent; a service writes
into registered memory directly only where that memory could be taken from it again (whole pages of one block), so that a service that answers too
late never writes into memory that its owner uses for something else. Everything else goes through the channel's own memory, for one copy.
torch and numpy are imported only by who asks for their views.
"""

from __future__ import annotations

import ctypes
from typing import Any

from kvfs.client.file.memory import PAGE_BYTES, RegisteredBuffer, registered_at
from kvfs.common.errors import InvalidArgument, OutOfRange, ReadOnly
from kvfs.common.transport.region import Span

DIRECT_BYTES_MIN = 4096
"""Less is copied sooner than its address is looked up."""


class Memory:
    """One buffer: its bytes, and the span of them that services on this host may touch, where there is one."""

    __slots__ = ("_direct", "_looked", "_owner", "_span", "view")

    def __init__(self, view: memoryview, *, direct: bool) -> None:
        """`direct`: services are to write into it, so only memory will do that can be taken from them again."""
        self.view = view
        self._direct = direct
        self._looked = False
        self._span: Span | None = None
        self._owner: RegisteredBuffer | None = None

    @property
    def span(self) -> Span | None:
        """Looked up when it is first asked for: bytes that this process reads itself need none."""
        if not self._looked:
            self._looked = True
            self._look()
        return self._span

    def part(self, length: int) -> Span | memoryview:
        """What a request names for the first `length` bytes."""
        span = self.span
        if span is not None:
            return span if length == span.length else span.part(0, length)
        return self.view[:length]

    def settle(self) -> None:
        """Nobody but this process touches the bytes from now on."""
        if self._span is not None and self._span.pinned and self._owner is not None:
            self._owner.forsake(self._span)

    def _look(self) -> None:
        length = len(self.view)
        if self.view.readonly or length < DIRECT_BYTES_MIN:
            return
        found = registered_at(ctypes.addressof(ctypes.c_ubyte.from_buffer(self.view)), length)
        if found is None:
            return
        self._owner, offset = found
        self._span = self._owner.direct(offset, length)
        if self._span is None and not self._direct and not self._owner.forsaken(offset, length):
            self._span = self._owner.span(offset, length)  # a service only reads it


def to_fill(buffer: Any, place: int, need_bytes: int) -> memoryview:
    """The bytes of a buffer that a block is to be read into. `need_bytes`: it must hold so many."""
    view = _flat(buffer, "buffer", place)
    if view.readonly:
        raise ReadOnly(f"buffer {place} is read-only: a block cannot be read into it")
    if len(view) < need_bytes:
        raise OutOfRange(f"buffer {place} has {len(view)} bytes, and {need_bytes} are needed")
    return view


def to_send(buffer: Any, place: int) -> Memory:
    """A block that is to be put."""
    return Memory(_flat(buffer, "block", place), direct=False)


def _flat(buffer: Any, what: str, place: int) -> memoryview:
    """The bytes of whatever it is."""
    if type(buffer) is memoryview:  # as nearly always, hundreds at once
        return _bytes_of(memoryview(buffer), what, place)
    if isinstance(buffer, RegisteredBuffer):
        buffer = buffer.span()
    if isinstance(buffer, Span):
        # A bare span is looked up by its address too: a get takes one only where it can be forsaken.
        view = buffer.view
    elif hasattr(buffer, "data_ptr"):
        view = _tensor(buffer, f"{what} {place}")
    else:
        try:
            view = memoryview(buffer)
        except (TypeError, ValueError, BufferError):  # numpy has types that it shows no bytes of
            raise InvalidArgument(
                f"{what} {place} is a {type(buffer).__name__}: it must be a bytes-like object, a numpy array of numbers or a torch tensor"
            ) from None
        view = _bytes_of(view, what, place)
    return view


def _bytes_of(view: memoryview, what: str, place: int) -> memoryview:
    if not view.c_contiguous:
        raise InvalidArgument(f"{what} {place} is not contiguous")
    if view.format == "B" and view.ndim == 1:
        return view
    if not view.nbytes:
        return memoryview(b"")
    if "O" in view.format:
        raise InvalidArgument(f"{what} {place} holds Python objects: their addresses are no content")
    return view.cast("B")


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

    def restore(self, place: int) -> None:
        """A block that is to be filled, of which nothing is kept: what a get had to take out of a service's reach is within it again, once that
        service has ended with it."""
        self.memory.restore(place * self.stride, self.stride)

    def close(self) -> None:
        self._views.clear()
        self.memory.close()

    def __enter__(self) -> BlockBuffers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
