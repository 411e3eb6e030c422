"""A Net whose connections note every frame that a client sends: where the fuzzer's real frames come from.

Owns the cutting of what was sent into frames. What passes is not changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from kvfs.common.boundary.net import ByteStream, ReadBuffer
from kvfs.common.boundary.system_net import SocketStream, SystemNet
from kvfs.common.wire.frame import HEADER_BYTES, Header, Kind, Limits, decode_header

LIMITS = Limits()


@dataclass(frozen=True, slots=True)
class Frame:
    header: Header
    message: bytes
    payload: bytes


def frames_in(data: bytes | bytearray) -> Iterator[Frame]:
    """Whole frames, as they were sent."""
    view = memoryview(data)
    place = 0
    while len(view) - place >= HEADER_BYTES:
        header = decode_header(view, place, LIMITS)
        stop = place + HEADER_BYTES + header.message_bytes
        end = stop + header.payload_bytes
        if end > len(view):
            return
        yield Frame(header, bytes(view[place + HEADER_BYTES : stop]), bytes(view[stop:end]))
        place = end


@dataclass(slots=True)
class Recording:
    sent: list[tuple[str, bytearray]] = field(default_factory=list)
    """Per connection: to which address, and what."""

    def requests(self) -> list[tuple[str, Frame]]:
        return [(address, frame) for address, data in self.sent for frame in frames_in(data) if frame.header.kind == Kind.REQUEST]


class RecordingNet(SystemNet):
    def __init__(self, recording: Recording) -> None:
        self._recording = recording

    async def connect(self, address: str, *, timeout_s: float) -> ByteStream:
        stream = await super().connect(address, timeout_s=timeout_s)
        assert isinstance(stream, SocketStream)
        sent = bytearray()
        self._recording.sent.append((address, sent))
        taking = stream.send_now

        def send_now(buffers: Sequence[ReadBuffer], fds: Sequence[int] = ()) -> int:
            taken = taking(buffers, fds)
            sent.extend(b"".join(buffers)[:taken])
            return taken

        stream.send_now = send_now  # type: ignore[method-assign]
        return stream
