"""The answering side: listens, shakes hands, and runs handlers for the requests that come.

A handler object has one method per RPC, by its snake-case name, called as `handler.read(request, call)`. It may be a plain `def` that returns the
reply (run inline in the connection's reader: the fast way for what never waits), an `async def` (run in a worker task), or a `def` that returns
either a reply or an awaitable. A handler runs to its end even if the caller's connection is lost; past its deadline and a grace it is cancelled.

A connection's own rules are in peer.py. An exception of a handler never ends the server.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Sequence
from typing import Any, Final

import trio

from kvfs.common.boundary.clock import Clock
from kvfs.common.boundary.net import Listener, Net
from kvfs.common.errors import DeadlineExceeded, ServiceStopping
from kvfs.common.transport.region import BufferPool
from kvfs.common.wire.frame import Limits
from kvfs.common.wire.identity import Identity
from kvfs.common.wire.peer import Call, Peer
from kvfs.common.wire.service import SERVICES, Method

log = logging.getLogger("kvfs.wire.server")

DEADLINE_GRACE_S: Final = 1.0

__all__ = ["Call", "RpcServer"]


class RpcServer:
    def __init__(self, net: Net, clock: Clock, identity: Identity, *, limits: Limits = Limits(), lends_files: bool = False) -> None:  # noqa: B008
        """`lends_files`: handlers may lend files to callers whom the kernel vouches for (lending.py)."""
        self.lends_files = lends_files
        self.net = net
        self.clock = clock
        self.identity = identity
        self.limits = limits
        self.handlers: dict[int, tuple[Method, Any]] = {}
        self.services: dict[str, object] = {}
        self._pool: BufferPool | None = None
        self._workers: trio.Nursery | None = None
        self._idle: list[_Worker] = []
        self._busy: set[_Worker] = set()
        self._reading: _Worker | None = None
        """Reads in place of a connection's reader, at this very moment, and may take a job."""
        self.peers: set[Peer] = set()

    def add(self, service: str, handler: object, methods: dict[str, Method] | None = None) -> None:
        """Serves `handler` as `service`. A method it lacks answers UnknownMethod. `methods` is for services outside the product's table (tests)."""
        self.services[service] = handler
        for method in (methods if methods is not None else SERVICES[service]).values():
            function = getattr(handler, method.attribute, None)
            if function is not None:
                self.handlers[method.key] = (method, function)

    @property
    def connections(self) -> list[Identity]:
        """Who is connected now."""
        return [peer.identity for peer in self.peers if peer.identity is not None]

    async def serve(self, addresses: Sequence[str], *, task_status: trio.TaskStatus[list[str]] = trio.TASK_STATUS_IGNORED) -> None:
        """Until cancelled. Starts with the list of real addresses, which is what others are to be told."""
        listeners: list[Listener] = []
        try:
            for address in addresses:
                listeners.append(await self.net.listen(address))
            async with trio.open_nursery() as workers:
                self._workers = workers
                async with trio.open_nursery() as nursery:
                    for listener in listeners:
                        nursery.start_soon(self._accept, listener, nursery)
                    nursery.start_soon(self._close_idle)
                    nursery.start_soon(self._end_overdue)
                    task_status.started([self._public(listener.address) for listener in listeners])
        finally:
            with trio.CancelScope(shield=True):
                for listener in listeners:
                    await listener.aclose()
            self._idle.clear()
            if self._pool is not None:
                self._pool.close()

    def _public(self, address: str) -> str:
        """A unix address means something on this machine and to this process only: it says which."""
        if address.startswith("unix://") and self.identity.client_id:
            return f"{address}?host={self.identity.host_id}&server={self.identity.client_id.hex()}"
        return address

    def payload_pool(self) -> BufferPool:
        if self._pool is None:
            self._pool = BufferPool(self.limits.payload_pool_bytes, name="kvfs-payload")
        return self._pool

    async def _accept(self, listener: Listener, nursery: trio.Nursery) -> None:
        while True:
            stream = await listener.accept()
            if len(self.peers) >= self.limits.connections:
                log.warning("refused %s: %d connections are open already", stream.peer, len(self.peers))
                stream.close()
                continue
            nursery.start_soon(Peer(self, stream).run)

    async def _close_idle(self) -> None:
        while True:
            await self.clock.sleep(self.limits.idle_s / 2)
            for peer in list(self.peers):
                peer.close_if_idle()

    def run(self, peer: Peer, method: Method, request_id: int, call: Call, awaitable: Awaitable[Any]) -> None:
        """Hands an awaitable to a worker task: the one that reads just now, if one does."""
        job = (peer, method, request_id, call, awaitable)
        if self._reading is not None and self._reading.job is None:
            self._reading.job = job
        elif self._idle:
            worker = self._idle.pop()
            worker.job = job
            trio.lowlevel.reschedule(worker.task)
        else:
            assert self._workers is not None
            self._workers.start_soon(self._work, _Worker(job))

    async def _work(self, worker: _Worker) -> None:
        worker.task = trio.lowlevel.current_task()
        with worker.scope:
            while (job := worker.job) is not None:
                self._busy.add(worker)
                peer, method, request_id, call, awaitable = job
                try:
                    reply = await awaitable
                    peer.answer(method, request_id, reply, call.bulk)
                except Exception as error:
                    peer.refuse(request_id, error, call.bulk, method)
                except BaseException:
                    if worker.overdue:
                        peer.refuse(request_id, DeadlineExceeded(f"{method.full_name} did not finish within its deadline"), call.bulk)
                    else:
                        peer.refuse(request_id, ServiceStopping("the service is stopping"), call.bulk)
                    raise
                finally:
                    self._busy.discard(worker)
                worker.job = job = call = awaitable = reply = None  # type: ignore[assignment]  # an idle worker keeps nothing alive
                if worker.overdue:
                    return
                if not await self._listen(worker, peer):
                    del peer
                    if not await self._rest(worker):
                        return

    async def _listen(self, worker: _Worker, peer: Peer) -> bool:
        """Reads in the place of the connection's reader, until that brings the worker a job: a turn of the loop earlier than if the reader woke it.
        False: the reader is at work itself, or another worker listens, or the connection is over."""
        while peer.listener is None and peer.take_over(worker.task):
            peer.listener = worker.task
            try:
                await trio.lowlevel.wait_task_rescheduled(peer.leave)
            except trio.ClosedResourceError:
                return False
            finally:
                peer.listener = None
            self._reading = worker
            try:
                peer.read_in_place()
            finally:
                self._reading = None
            if worker.job is not None:
                peer.give_back()
                return True
        return False

    async def _rest(self, worker: _Worker) -> bool:
        """Until the worker is given a job. False: there are enough idle ones."""
        if len(self._idle) >= self.limits.in_flight:
            return False
        self._idle.append(worker)
        await trio.lowlevel.wait_task_rescheduled(worker.give_up(self._idle))
        return True

    async def _end_overdue(self) -> None:
        """Cancels handlers past their deadline and the grace. One look at all of them now and then: a timer for each would cost a tenth of a call."""
        while True:
            await self.clock.sleep(DEADLINE_GRACE_S / 2)
            now = self.clock.monotonic()
            for worker in [worker for worker in self._busy if worker.job is not None and worker.job[3].deadline + DEADLINE_GRACE_S / 2 <= now]:
                worker.overdue = True
                worker.scope.cancel()


_Job = tuple["Peer", Method, int, Call, Awaitable[Any]]


class _Worker:
    __slots__ = ("job", "overdue", "scope", "task")

    task: trio.lowlevel.Task

    def __init__(self, job: _Job) -> None:
        self.job: _Job | None = job
        self.overdue = False
        self.scope = trio.CancelScope()

    def give_up(self, idle: list[_Worker]) -> Any:
        def abort(_raise: object) -> trio.lowlevel.Abort:
            if self in idle:
                idle.remove(self)
            return trio.lowlevel.Abort.SUCCEEDED

        return abort
