"""A client whose answers are wrong, all of it and its channels alone.

On a damaged wire it gives right bytes or a typed error, against a lying server a typed error; never a hang, never another exception, and it goes on
once the answers are right again.
"""

from __future__ import annotations

import contextlib
import os
import random
import time
from pathlib import Path
from typing import Any

import pytest
import trio
from tests.unit.client.whole import Whole, whole

from kvfs.client.async_client import AsyncClient, open_client
from kvfs.client.config import ClientConfig
from kvfs.client.user import User
from kvfs.common.boundary.clock import SystemClock
from kvfs.common.boundary.net import ByteStream
from kvfs.common.boundary.system_net import SystemNet
from kvfs.common.errors import KvfsError, TransportError
from kvfs.common.transport.region import Region
from kvfs.common.wire import base_pb2
from kvfs.common.wire.channel import ChannelPool
from kvfs.common.wire.frame import Kind, Limits, encode
from kvfs.common.wire.identity import Identity
from kvfs.common.wire.line import Line
from kvfs.common.wire.server import Call, RpcServer
from kvfs.common.wire.service import METHODS, SERVICES, Method, method

from .facts import Facts
from .mutate import Mutator
from .tampering import TamperingNet

SEED = int(os.environ.get("KVFS_SEED", "2026"))
TAMPERED = int(os.environ.get("KVFS_FUZZ_ANSWERS", "60"))
HANG_S = 20.0
"""On a busy machine; each operation ends after half a second."""
CLIENT_HANG_S = 240.0
CONFIG = ClientConfig(
    buffer_pool_bytes=16 << 20,
    shared_memory=False,
    deadline_s=0.5,
    meta_attempt_s=0.2,
    read_attempt_s=0.2,
    write_attempt_s=0.2,
    backoff_first_s=0.001,
    backoff_max_s=0.01,
    suspect_s=0.01,
)
HONEST = ClientConfig(buffer_pool_bytes=16 << 20, shared_memory=False)
SIZE = 150_000


PATIENCE_S = max(300, TAMPERED // 2)
CALLS = TAMPERED * 25
LINES = TAMPERED * 5
READ = method("Storage", "Read")
ATTRIBUTES = frozenset(entry.attribute for entry in METHODS.values())


def content(number: int) -> bytes:
    return random.Random(number).randbytes(SIZE)


async def operate(client: AsyncClient, chance: random.Random, written: set[int], *, lies: bool) -> None:
    number = chance.randrange(1, 12)
    path = f"/files/{number}"
    match chance.randrange(6):
        case 0 | 1:
            written.discard(number)
            await client.write_bytes(path, content(number))
            written.add(number)
        case 2 | 3:
            if number in written:
                async with await client.open(path) as file:
                    found = await file.read(SIZE + 1)  # not whatever length a liar says: zeros of a hole are a right answer
                assert lies or found == content(number), f"{path}: {len(found)} wrong bytes"
        case 4:
            await client.listdir("/files")
            await client.stat(path)
        case _:
            await client.setxattr("/files", "user.x", b"1")
            await client.statfs()


async def suffer(made: Whole, *, lies: bool) -> None:
    chance = random.Random(f"{SEED}/{lies}")
    net = TamperingNet(chance, Mutator(chance, Facts(), {}), lies=lies, every=4)
    written: set[int] = set()
    outcomes: dict[str, int] = {}
    user = User(0, 0)
    async with made.client(config=HONEST, user=user) as honest:
        await honest.mkdir("/files", 0o777)
    while net.tampered < TAMPERED:
        net.on = True
        try:
            with trio.fail_after(CLIENT_HANG_S):
                async with open_client(made.address, config=CONFIG, net=net, user=user) as client:
                    for _ in range(30):
                        began_s = time.monotonic()
                        try:
                            await operate(client, chance, written, lies=lies)
                            name = "ok"
                        except KvfsError as error:
                            name = type(error).__name__
                        outcomes[name] = outcomes.get(name, 0) + 1
                        assert time.monotonic() - began_s < HANG_S, "an operation went on long after its deadline"
                    net.on = False
                    with trio.move_on_after(5):
                        while True:
                            try:
                                await client.stat("/files")
                                break
                            except KvfsError:
                                await trio.sleep(0.05)
        except KvfsError as error:
            outcomes[type(error).__name__] = outcomes.get(type(error).__name__, 0) + 1
    print(f"seed {SEED}: {net.tampered} wrong answers; {dict(sorted(outcomes.items()))}")
    assert outcomes["ok"] > 10 and len(outcomes) > 3
    async with made.client(config=HONEST, user=user) as honest:
        if not lies:
            for number in written:
                assert await honest.read_bytes(f"/files/{number}") == content(number), "an acknowledged write is not there"
        await honest.write_bytes("/files/last", content(0))
        assert await honest.read_bytes("/files/last") == content(0)


@pytest.mark.timeout(PATIENCE_S)
def test_a_damaged_wire_never_gives_wrong_bytes() -> None:
    async def main() -> None:
        async with whole(storage=2, replicas=2) as made:
            await suffer(made, lies=False)

    trio.run(main)


@pytest.mark.timeout(PATIENCE_S)
def test_a_lying_server_gives_typed_errors() -> None:
    async def main() -> None:
        async with whole(storage=2, replicas=2) as made:
            await suffer(made, lies=True)

    trio.run(main)


class Made:
    """Answers every method with something that could be true."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        self._facts = Facts()

    def __getattr__(self, name: str) -> Any:
        if name not in ATTRIBUTES:
            raise AttributeError(name)
        return self._answer

    def _answer(self, request: Any, call: Call) -> Any:
        if call.method is READ:
            for view in call.bulk.sink():
                view[:] = b"b" * len(view)
        return self._facts.made(call.method.reply, self._chance)


@pytest.mark.timeout(PATIENCE_S)
@pytest.mark.parametrize("lies", [False, True], ids=["damaged", "lying"])
def test_wrong_answers_to_every_method_end_calls_with_typed_errors(lies: bool, caplog: pytest.LogCaptureFixture) -> None:
    """The channel alone: many more answers, of all methods."""
    chance = random.Random(f"{SEED}/{lies}/channel")
    net = TamperingNet(chance, Mutator(chance, Facts(), {}), lies=lies, every=2)
    clock = SystemClock()
    outcomes: dict[str, int] = {}

    async def call(pool: ChannelPool, where: list[str], known: Method) -> None:
        memory = [bytearray(100), bytearray(5000)] if known is READ else []
        request = Facts().made(known.request, chance)
        request.ClearField("bulk") if known.has_bulk else None
        try:
            with trio.fail_after(HANG_S):
                reply = await pool.call(where, known, request, timeout_s=0.2, receive=memory)
            assert isinstance(reply, known.reply)
            name = "ok"
        except KvfsError as error:
            name = type(error).__name__
        outcomes[name] = outcomes.get(name, 0) + 1

    async def main() -> None:
        server = RpcServer(SystemNet(), clock, Identity("fuzz", bytes(16), "storage"))
        for service in SERVICES:
            server.add(service, Made(chance))
        async with trio.open_nursery() as nursery:
            where = await nursery.start(server.serve, ["tcp://127.0.0.1:0"])
            async with ChannelPool(net, clock, Identity("fuzz", bytes(range(16)))) as pool:
                for _ in range(CALLS // 8):
                    async with trio.open_nursery() as calls:
                        for _ in range(8):
                            calls.start_soon(call, pool, where, chance.choice(list(METHODS.values())))
                net.on = False
                status = method("Manager", "Status")
                with contextlib.suppress(TransportError):  # the end of a frame that was cut short last may be awaited still
                    await pool.call(where, status, base_pb2.Empty(), timeout_s=1)
                assert await pool.call(where, status, base_pb2.Empty(), timeout_s=HANG_S), "after that silence it connects anew"
            nursery.cancel_scope.cancel()

    trio.run(main)
    print(f"seed {SEED}: {net.tampered} wrong answers; {dict(sorted(outcomes.items()))}")
    assert outcomes["ok"] > 10 and len(outcomes) > 3
    assert [record for record in caplog.records if record.levelname in ("ERROR", "CRITICAL")] == []


@pytest.mark.timeout(PATIENCE_S)
@pytest.mark.parametrize("lies", [False, True], ids=["damaged", "lying"])
def test_wrong_answers_on_a_line_of_a_thread_are_typed_errors(lies: bool, tmp_path: Path) -> None:
    """A line handles its frames itself (common/wire/line.py)."""
    chance = random.Random(f"{SEED}/{lies}/line")
    net = TamperingNet(chance, Mutator(chance, Facts(), {}), lies=lies, every=2)
    identity, other = Identity("fuzz", bytes(16), "storage"), Identity("fuzz", bytes(range(16)))
    write = method("Storage", "Write")
    outcomes: dict[str, int] = {}

    async def answer(stream: ByteStream) -> None:
        buffer = memoryview(bytearray(1 << 16))
        reply = Facts().made(write.reply, chance).SerializeToString()
        with contextlib.suppress(KvfsError):
            for frame in (encode(Kind.HELLO, 0, identity.hello()), encode(chance.choice((Kind.REPLY, Kind.REPLY_HELD)), 2, reply)):
                if not await stream.receive_into(buffer):
                    break
                await stream.send([net.tampered_with(frame, write)])
            while await stream.receive_into(buffer):
                pass
        stream.close()

    def call(path: str, region: Region) -> None:
        try:
            line = Line.open(SystemNet(), other, path, identity.client_id.hex(), timeout_s=0.2, limits=Limits())
            try:
                assert isinstance(line.call(write, write.request(), region.span(0, 100), timeout_s=0.2), write.reply)
                name = "ok"
            finally:
                line.close()
        except KvfsError as error:
            name = type(error).__name__
        outcomes[name] = outcomes.get(name, 0) + 1

    async def main() -> None:
        path = str(tmp_path / "line.sock")
        listener = await SystemNet().listen(f"unix://{path}")
        region = Region.create(4096)
        async with trio.open_nursery() as nursery:

            async def accept() -> None:
                while True:
                    nursery.start_soon(answer, await listener.accept())

            nursery.start_soon(accept)
            for _ in range(LINES):
                with trio.fail_after(HANG_S):
                    await trio.to_thread.run_sync(call, path, region)
            nursery.cancel_scope.cancel()
        await listener.aclose()
        region.close()

    trio.run(main)
    print(f"seed {SEED}: {net.tampered} wrong answers; {dict(sorted(outcomes.items()))}")
    assert outcomes["ok"] > 10 and len(outcomes) > 3
