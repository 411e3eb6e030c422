"""Simulated network: hosts joined by byte streams that are late, stall, or break, as the seed and the test say.

A `SimFabric` is the whole network; `fabric.host("a")` is the Net of one machine. Streams keep what TCP promises: bytes arrive in order, whole, once,
or the stream breaks. What may happen to them: a delay per send (drawn from `latency_s`, more for a host that `lags_s`), a stall while two hosts are
partitioned, both ways or one (a connection attempt then fails after its time), a break of every stream between two hosts, and, with
`break_probability`, a break at any send. A host may crash: its peers are told, unless it lost power or cannot reach them, when they learn of it only
once it is there again; one that lost power has another `host_id` then. Unix addresses reach only the host that listens on them, and carry file
descriptors. Nothing here is random but by the fabric's Random.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Final

import trio

from kvfs.common.boundary.net import MAX_FDS, ByteStream, Here, Listener, Net, ReadBuffer, parse_address
from kvfs.common.boundary.random import Random, SeededRandom
from kvfs.common.errors import AddressInUse, ConnectionLost, Unreachable

_WINDOW_BYTES: Final = 256 << 10
_FIRST_FREE_PORT: Final = 40000
_BACKLOG: Final = 512


class SimFabric:
    def __init__(self, random: Random | None = None, *, latency_s: tuple[float, float] = (0.0, 0.0), break_probability: float = 0.0) -> None:
        self.random = random if random is not None else SeededRandom(0)
        self.latency_s = latency_s
        self.break_probability = break_probability
        self.lags_s: dict[str, float] = {}
        """By host: what is added to every delay, at most."""
        self.on_send: Callable[[SimStream, bytes], None] | None = None
        """Sees what a stream sends."""
        self._nets: dict[str, SimNet] = {}
        self._boots: dict[str, int] = {}
        self._listeners: dict[str, SimListener] = {}
        self._partitions: list[tuple[frozenset[str], frozenset[str], bool]] = []
        self._streams: list[SimStream] = []
        self._orphans: list[SimStream] = []
        """Whose other end is gone without their knowledge."""
        self._healed = trio.Event()
        self._next_port = _FIRST_FREE_PORT

    def host(self, name: str) -> SimNet:
        net = self._nets[name] = SimNet(self, name)
        self._tell_orphans()
        return net

    def boot(self, name: str) -> int:
        """How often the machine has lost power."""
        return self._boots.get(name, 0)

    def partition(self, one: Iterable[str], other: Iterable[str], *, one_way: bool = False) -> None:
        """No byte passes between the two groups of hosts until `heal`; what was under way is held. `one_way`: none from `one` to `other`."""
        self._partitions.append((frozenset(one), frozenset(other), one_way))

    def heal(self) -> None:
        self._partitions.clear()
        healed, self._healed = self._healed, trio.Event()
        healed.set()
        self._tell_orphans()

    def blocked(self, sender: str, receiver: str) -> bool:
        return any(
            (sender in left and receiver in right) or (not one_way and sender in right and receiver in left)
            for left, right, one_way in self._partitions
        )

    def parted(self, one: str, other: str) -> bool:
        """Whether no connection can be made."""
        return bool(self._partitions) and (self.blocked(one, other) or self.blocked(other, one))

    def delay_s(self, sender: str, receiver: str) -> float:
        low, high = self.latency_s
        return self.random.uniform(low, high + self.lags_s.get(sender, 0.0) + self.lags_s.get(receiver, 0.0))

    def break_streams(self, one: str, other: str | None = None) -> None:
        """Resets every stream between two hosts (or of one host)."""
        for stream in list(self._streams):
            if stream.host == one and (other is None or stream.far.host == other):
                stream.reset()
                stream.far.reset()

    def crash_host(self, name: str, *, silent: bool = False) -> None:
        """As when a machine's processes die: its listeners go and its streams break; nothing leaves it any more. `silent`: the machine itself died,
        and nobody is told."""
        if silent:
            self._boots[name] = self._boots.get(name, 0) + 1
        net = self._nets.pop(name, None)
        if net is not None:
            net.dead = True
        for address, listener in list(self._listeners.items()):
            if listener.host == name:
                del self._listeners[address]
                listener.stop()
        for stream in [stream for stream in self._streams if stream.host == name]:
            far = stream.far
            stream.dead = True
            stream.reset()
            if silent or self.blocked(name, far.host):
                self._orphans.append(far)
            else:
                far.reset()

    def _tell_orphans(self) -> None:
        """A host that is there again resets connections that it does not know."""
        orphans, self._orphans = self._orphans, []
        for stream in orphans:
            if stream.far.host in self._nets and not self.parted(stream.host, stream.far.host):
                stream.reset()
            else:
                self._orphans.append(stream)


class SimNet(Net):
    """The network as one host sees it, until that host crashes."""

    def __init__(self, fabric: SimFabric, name: str) -> None:
        self._fabric = fabric
        self.name = name
        self.host_id = f"{name}, boot {fabric.boot(name)}"
        self.dead = False

    @property
    def here(self) -> Here:
        return Here(self.host_id, self.name, 1)

    def _key(self, address: str) -> str:
        return f"{self.name}|{address}" if address.startswith("unix://") else address

    async def connect(self, address: str, *, timeout_s: float) -> ByteStream:
        parse_address(address)
        fabric = self._fabric
        await trio.lowlevel.checkpoint()
        with trio.move_on_after(timeout_s):
            await trio.sleep(fabric.random.uniform(*fabric.latency_s))
            while True:
                if self.dead:
                    raise Unreachable(f"cannot connect to {address}: this host is down")
                listener = fabric._listeners.get(self._key(address))
                if listener is None:
                    raise Unreachable(f"cannot connect to {address}: nobody listens there")
                if not fabric.parted(self.name, listener.host):
                    break
                await fabric._healed.wait()
            if len(listener.waiting) >= _BACKLOG:
                raise Unreachable(f"cannot connect to {address}: its queue is full")
            fds = address.startswith("unix://")
            near = SimStream(fabric, self.name, address, fds)
            far = SimStream(fabric, listener.host, f"sim://{self.name}", fds)
            near.far, far.far = far, near
            fabric._streams += [near, far]
            listener.waiting.append(far)
            listener.arrived.set()
            return near
        raise Unreachable(f"no answer from {address} within {timeout_s:g} s")

    async def listen(self, address: str) -> Listener:
        await trio.lowlevel.checkpoint()
        fabric = self._fabric
        if self.dead:
            raise AddressInUse(f"{address}: this host is down")
        _, where = parse_address(address)
        if isinstance(where, tuple) and where[1] == 0:
            address = f"{address.rpartition(':')[0]}:{fabric._next_port}"
            fabric._next_port += 1
        if self._key(address) in fabric._listeners:
            raise AddressInUse(f"{address} is in use by another process: stop it, or choose another address (port 0 takes any free one)")
        listener = SimListener(fabric, self.name, address, self._key(address))
        fabric._listeners[self._key(address)] = listener
        return listener


class SimListener(Listener):
    def __init__(self, fabric: SimFabric, host: str, address: str, key: str) -> None:
        self._fabric = fabric
        self._key = key
        self._closed = False
        self.host = host
        self.address = address
        self.waiting: deque[SimStream] = deque()
        self.arrived = trio.Event()

    async def accept(self) -> ByteStream:
        await trio.lowlevel.checkpoint()
        while not self.waiting:
            if self._closed:
                raise ConnectionLost(f"listener {self.address} was closed")
            self.arrived = trio.Event()
            await self.arrived.wait()
        return self.waiting.popleft()

    def stop(self) -> None:
        self._closed = True
        while self.waiting:
            self.waiting.popleft().close()
        self.arrived.set()

    async def aclose(self) -> None:
        if not self._closed:
            self._fabric._listeners.pop(self._key, None)
            self.stop()
        await trio.lowlevel.checkpoint()


class _Parcel:
    __slots__ = ("at", "data", "fds")

    def __init__(self, at: float, data: bytes, fds: list[int]) -> None:
        self.at = at
        self.data = memoryview(data)
        self.fds = fds


class SimStream(ByteStream):
    """One end. What this end receives is queued here, by the far end."""

    far: SimStream

    def __init__(self, fabric: SimFabric, host: str, peer: str, carries_fds: bool) -> None:
        self._fabric = fabric
        self.host = host
        self.peer = peer
        self.carries_fds = carries_fds
        self.trusted = carries_fds  # a simulated machine has one user
        self._parcels: deque[_Parcel] = deque()
        self._queued = 0
        self._last_at = 0.0
        self._no_more = False
        self.dead = False
        """Its host crashed: nothing that its owner still does can be seen."""
        self._broken = ""
        self._closed = False
        self._fds: list[int] = []
        self._readable = trio.Event()
        self._writable = trio.Event()

    def _check(self) -> None:
        if self._closed:
            raise ConnectionLost(f"connection with {self.peer} lost: it was closed here")
        if self._broken:
            raise ConnectionLost(f"connection with {self.peer} lost: {self._broken}")

    def send_now(self, buffers: Sequence[ReadBuffer], fds: Sequence[int] = ()) -> int:
        self._check()
        fabric, far = self._fabric, self.far
        if fabric.break_probability and fabric.random.uniform(0, 1) < fabric.break_probability:
            self.reset()
            far.reset()
            self._check()
        if (far._closed or far._broken) and not far.dead:
            self.reset("broken pipe")
            self._check()
        room = _WINDOW_BYTES - far._queued
        if room <= 0:
            return 0
        data = b"".join(buffers)[:room]
        if not data:
            return 0
        if fabric.on_send is not None:
            fabric.on_send(self, data)
        at = max(far._last_at, trio.current_time() + fabric.delay_s(self.host, far.host))
        far._last_at = at
        far._parcels.append(_Parcel(at, data, [os.dup(fd) for fd in fds]))
        far._queued += len(data)
        far._readable.set()
        return len(data)

    def receive_now(self, views: Sequence[memoryview]) -> int | None:
        self._check()
        if self._fabric._partitions and self._fabric.blocked(self.far.host, self.host):
            self._check()
            return None
        placed = 0
        now = trio.current_time()
        for view in views:
            filled = 0
            while filled < view.nbytes and self._parcels and self._parcels[0].at <= now:
                parcel = self._parcels[0]
                if parcel.fds:
                    if placed or filled:
                        return placed + filled  # descriptors come with the first byte of their parcel
                    self._fds += parcel.fds
                    parcel.fds = []
                count = min(view.nbytes - filled, len(parcel.data))
                view[filled : filled + count] = parcel.data[:count]
                parcel.data = parcel.data[count:]
                filled += count
                if not parcel.data:
                    self._parcels.popleft()
            placed += filled
            if filled < view.nbytes:
                break
        if len(self._fds) > MAX_FDS:
            self.reset("too many file descriptors")
            self._check()
        if placed:
            self._queued -= placed
            self.far._writable.set()
            return placed
        return 0 if self._no_more and not self._parcels else None

    async def wait_writable(self) -> None:
        await trio.lowlevel.checkpoint()
        while not (self._closed or self._broken or (self.far._closed and not self.far.dead)) and self.far._queued >= _WINDOW_BYTES:
            self._writable = trio.Event()
            await self._writable.wait()
        self._check()

    async def wait_readable(self) -> None:
        await trio.lowlevel.checkpoint()
        while not (self._closed or self._broken):
            if self._fabric._partitions and self._fabric.blocked(self.far.host, self.host):
                await self._wait_for(self._fabric._healed)
            elif self._parcels:
                if self._parcels[0].at <= trio.current_time():
                    return
                await trio.sleep_until(self._parcels[0].at)
            elif self._no_more:
                return
            else:
                self._readable = trio.Event()
                await self._readable.wait()
        self._check()

    async def _wait_for(self, healed: trio.Event) -> None:
        """For the partition's end, or the stream's."""
        self._readable = trio.Event()
        async with trio.open_nursery() as nursery:

            async def either(event: trio.Event) -> None:
                await event.wait()
                nursery.cancel_scope.cancel()

            nursery.start_soon(either, healed)
            nursery.start_soon(either, self._readable)

    def taken_fds(self) -> list[int]:
        fds, self._fds = self._fds, []
        return fds

    def close_sending(self) -> None:
        self.far._no_more = True
        self.far._readable.set()

    def reset(self, reason: str = "connection reset by peer") -> None:
        if not self._broken:
            self._broken = reason
            self._throw_away()
            self._readable.set()
            self._writable.set()

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._throw_away()
            if not self.dead:
                self.close_sending()
                self.far._writable.set()
            self._readable.set()
            self._writable.set()
            if self in self._fabric._streams:
                self._fabric._streams.remove(self)

    def _throw_away(self) -> None:
        for parcel in self._parcels:
            self._fds += parcel.fds
        self._parcels.clear()
        for fd in self.taken_fds():
            os.close(fd)
