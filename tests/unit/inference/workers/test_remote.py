"""A worker as a router sees it, over a pool whose answers the test gives."""

from __future__ import annotations

from typing import Any

import trio

from kvfs.common.boundary.clock import SystemClock
from kvfs.common.boundary.random import SeededRandom
from kvfs.common.errors import ConnectionLost
from kvfs.common.wire import base_pb2 as base
from kvfs.common.wire import inference_pb2 as pb
from kvfs.inference.request import Finish, Request, Sampling, TokenEvent
from kvfs.inference.workers.messages import event_to_wire
from kvfs.inference.workers.remote import RemoteWorker

INCARNATION = b"i" * 16


class Pool:
    """Says yes to everything; what Next answers is up to the test."""

    def __init__(self) -> None:
        self.begun: list[tuple[bytes, bool]] = []
        self.cancelled: list[tuple[bytes, list[str]]] = []
        self.nexts: list[trio.MemoryReceiveChannel[Any]] = []

    async def call(self, addresses: object, what: Any, message: Any, *, timeout_s: float) -> Any:
        await trio.lowlevel.checkpoint()
        if what.name == "Status":
            return pb.WorkerStatusReply(incarnation=INCARNATION, role="both", pages=10)
        if what.name == "Submit":
            self.begun.append((message.session, message.begin))
        if what.name == "Cancel":
            self.cancelled.append((message.session, list(message.requests)))
        if what.name == "Next":
            answer = await self.nexts.pop(0).receive() if self.nexts else await trio.sleep_forever()
            if isinstance(answer, Exception):
                raise answer
            return answer
        return base.Empty()


def test_a_late_error_of_an_earlier_session_loses_nothing_of_the_present_one() -> None:
    async def main() -> None:
        pool = Pool()
        say, pool_hears = trio.open_memory_channel[Any](2)
        pool.nexts = [pool_hears, pool_hears.clone()]
        worker = RemoteWorker("w", ["tcp://w:1"], pool, SystemClock(), SeededRandom(1))  # type: ignore[arg-type]

        async def up() -> None:
            while not worker.serving:
                await trio.sleep(0.01)

        with trio.fail_after(10):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(worker.run)
                await up()
                first = await worker.submit(Request(id="a", prompt=(1, 2), sampling=Sampling(max_tokens=2)))
                await trio.sleep(0.1)  # it asks for tokens now
                worker._lost("said the status")
                assert [event async for event in first] == []
                await up()
                second = await worker.submit(Request(id="b", prompt=(1, 2), sampling=Sampling(max_tokens=2)))
                await say.send(ConnectionLost("late"))
                await say.send(pb.NextReply(first=1, events=[event_to_wire(TokenEvent(request="", index=0, token=9, finish=Finish.STOP), "b", True)]))
                assert [event.token async for event, _ in second] == [9]
                while not pool.cancelled:
                    await trio.sleep(0.01)
                nursery.cancel_scope.cancel()
        (one, begin), (other, again) = pool.begun
        assert one != other and begin and again
        assert pool.cancelled == [(one, ["a"])], "what was lost with the connection may be going on there"

    trio.run(main)


def test_only_the_first_request_begins_the_session() -> None:
    async def main() -> None:
        pool = Pool()
        worker = RemoteWorker("w", ["tcp://w:1"], pool, SystemClock(), SeededRandom(1))  # type: ignore[arg-type]
        with trio.fail_after(10):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(worker.run)
                while not worker.serving:
                    await trio.sleep(0.01)
                for name in "ab":
                    await worker.submit(Request(id=name, prompt=(1, 2), sampling=Sampling(max_tokens=2)))
                nursery.cancel_scope.cancel()
        assert [begin for _, begin in pool.begun] == [True, False]

    trio.run(main)
