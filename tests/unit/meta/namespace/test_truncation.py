"""The Meta service: truncations on the chains, whole or not at all, also when the service or a chain dies half-way."""

from __future__ import annotations

from typing import Any

import pytest
import trio
from tests.unit.meta.namespace.service_world import CHAINS, SIZE, B, FakeChunks, Service, run

from kvfs.common.errors import NoServingTarget
from kvfs.common.wire import meta_pb2 as pb
from kvfs.meta.gc import cuts, housekeeping
from kvfs.meta.gc.chunks import LastChunk, Turn
from kvfs.meta.server import make_pruner

S1, S2 = b"1" * 16, b"2" * 16


@pytest.mark.parametrize(
    ("length", "left"),
    [
        (0, {}),
        (1, {0: 1}),
        (SIZE, {0: SIZE}),
        (SIZE + 5, {0: SIZE, 1: 5}),
        (5 * SIZE + 100, {0: SIZE, 1: SIZE, 2: SIZE, 3: SIZE, 4: SIZE, 5: 100}),
    ],
)
def test_truncate_cuts_the_chunks(length: int, left: dict[int, int]) -> None:
    async def main() -> None:
        service = await Service().start()
        made = await service.create(b"f")
        await service.write(made, 6 * SIZE + 7)
        reply = await service.call("set_attr", pb.SetAttrRequest(inode=made.inode, length=length))
        assert reply.inode.length == length
        assert service.chunks.of(made.inode) == left
        await service.call("set_attr", pb.SetAttrRequest(inode=made.inode, length=10 * SIZE))
        assert service.chunks.of(made.inode) == left
        await service.check()

    run(main)


def test_opening_with_truncate_cuts_the_chunks() -> None:
    async def main() -> None:
        service = await Service().start()
        made = await service.create(b"f")
        await service.write(made, 3 * SIZE)
        await service.call("open", pb.OpenRequest(inode=made.inode, write=True, truncate=True, session=S1))
        assert service.chunks.of(made.inode) == {}
        service.chunks.write(made, SIZE)
        reply = await service.call("create", pb.CreateRequest(parent=1, name=b"f", write=True, truncate=True, session=S2))
        assert reply.inode.length == 0 and not reply.created
        assert service.chunks.of(made.inode) == {}

    run(main)


def test_a_truncation_whose_service_died_is_carried_out_by_the_next() -> None:
    async def main() -> None:
        service = await Service().start()
        made = await service.create(b"f")
        await service.write(made, 3 * SIZE)
        service.chunks.failing = set(CHAINS)
        with pytest.raises(NoServingTarget):
            await service.call("set_attr", pb.SetAttrRequest(inode=made.inode, length=10))
        assert (await service.stat(made.inode)).length == 10
        service.chunks.failing = set()
        after = await Service(service.engine, service.chunks).start()
        assert await after.meta.cuts.redo_all() == 1
        assert service.chunks.of(made.inode) == {0: 10}
        assert await after.meta.cuts.redo_all() == 0

    run(main)


def test_the_retry_of_a_truncation_that_failed_half_way_finishes_it() -> None:
    async def main() -> None:
        service = await Service().start()
        made = await service.create(b"f")
        await service.write(made, 3 * SIZE)
        service.chunks.failing = {CHAINS[0]}
        request = pb.SetAttrRequest(inode=made.inode, length=10)
        with pytest.raises(NoServingTarget):
            await service.call("set_attr", request, request_id=b"r" * 16)
        service.chunks.failing = set()
        await service.call("set_attr", request, request_id=b"r" * 16)
        assert service.chunks.of(made.inode) == {0: 10}

    run(main)


@pytest.mark.parametrize("how", ["open", "create", "create by path"])
def test_the_retry_of_an_open_whose_truncation_failed_finishes_it(how: str) -> None:
    async def main() -> None:
        service = await Service().start()
        made = await service.create(b"f")
        await service.write(made, 3 * SIZE)
        service.chunks.failing = {CHAINS[0]}
        if how == "open":
            request: Any = pb.OpenRequest(inode=made.inode, write=True, truncate=True, session=S1)
        else:
            request = pb.CreateRequest(parent=1, write=True, truncate=True, session=S1)
            if how == "create":
                request.name = b"f"
            else:
                request.path.append(b"f")
        method = how.split()[0]
        with pytest.raises(NoServingTarget):
            await service.call(method, request, request_id=b"r" * 16)
        service.chunks.failing = set()
        await service.call(method, request, request_id=b"r" * 16)
        assert service.chunks.of(made.inode) == {}
        assert not service.meta.cuts._locks

    run(main)


async def _left_undone(service: Service) -> pb.Inode:
    """A file of three chunks whose truncation to 10 bytes could not reach its chains; they serve again."""
    made = await service.create(b"f", write=True, session=S1)
    await service.write(made, 3 * SIZE, session=S1, still_open=True)
    service.chunks.failing = set(CHAINS)
    with pytest.raises(NoServingTarget):
        await service.call("set_attr", pb.SetAttrRequest(inode=made.inode, length=10))
    service.chunks.failing = set()
    assert service.chunks.of(made.inode) == {0: SIZE, 1: SIZE, 2: SIZE}
    return made


@pytest.mark.parametrize("how", ["open", "create", "append", "ask"])
def test_nobody_writes_before_a_truncation_that_failed_has_reached_the_chains(how: str) -> None:
    """Or the file, grown again by the write, would show what had been cut off; and the cut, when it came, would take what was written since."""

    async def main() -> None:
        service = await Service().start()
        made = await _left_undone(service)
        if how == "open":
            await service.call("open", pb.OpenRequest(inode=made.inode, write=True, session=S2))
        elif how == "create":
            await service.call("create", pb.CreateRequest(parent=1, name=b"f", write=True, session=S2))
        elif how == "append":
            reply = await service.call("append", pb.AppendRequest(inode=made.inode, session=S1, length=5))
            assert reply.offset == 10
        else:
            reply = await service.call("append", pb.AppendRequest(inode=made.inode, session=S1))
            assert (reply.offset, reply.inode.length) == (10, 10)
        assert service.chunks.of(made.inode) == {0: 10}
        assert not service.meta.cuts._locks
        await service.check()

    run(main)


def test_a_writer_that_has_not_heard_of_a_failed_truncation_does_not_undo_it() -> None:
    async def main() -> None:
        service = await Service().start()
        made = await _left_undone(service)
        reply = await service.call(
            "close", pb.CloseRequest(inode=made.inode, session=S1, wrote=True, length=3 * SIZE, truncate_version=made.truncate_version)
        )
        assert reply.inode.length == 10 and service.chunks.of(made.inode) == {0: 10}

    run(main)


def test_a_truncation_that_failed_is_tried_again_in_the_background() -> None:
    async def main() -> None:
        service = await Service().start()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(housekeeping.run, service.meta, None)
            await trio.sleep(1)
            made = await _left_undone(service)
            service.chunks.failing = {CHAINS[0]}
            await trio.sleep(5)
            service.chunks.failing = set()
            await trio.sleep(5)
            assert service.chunks.of(made.inode) == {0: 10}
            nursery.cancel_scope.cancel()

    run(main)


def test_truncations_of_one_file_follow_each_other() -> None:
    async def main() -> None:
        service = await Service().start()
        made = await service.create(b"f")
        await service.write(made, 8 * SIZE)
        service.chunks.delay_s = 1.0

        async def cut(length: int) -> None:
            await service.call("set_attr", pb.SetAttrRequest(inode=made.inode, length=length))

        async with trio.open_nursery() as nursery:
            for length in (7 * SIZE, 3 * SIZE + 1, 5 * SIZE, 2 * SIZE, 6 * SIZE):
                nursery.start_soon(cut, length)
        assert max(service.chunks.of(made.inode)) <= 2
        assert not service.meta.cuts._locks
        await service.check()

    run(main)


def test_a_report_from_before_a_truncate() -> None:
    async def main() -> None:
        service = await Service().start()
        made = await service.create(b"f", write=True, session=S1)
        await service.write(made, 4 * SIZE)
        await service.call("set_attr", pb.SetAttrRequest(inode=made.inode, length=100), B)
        service.chunks.write(made, SIZE + 9)  # written after the cut by a client that has not heard of it
        reply = await service.call("close", pb.CloseRequest(inode=made.inode, session=S1, wrote=True, length=4 * SIZE, truncate_version=0))
        assert reply.inode.length == SIZE + 9

    run(main)


@pytest.mark.parametrize("what", ["a report", "the end of a dead client"])
def test_a_length_is_not_measured_while_the_file_is_cut(what: str) -> None:
    """What was measured before the cut made the file as long again, with zeros."""

    async def main() -> None:
        service = await Service().start()
        made = await service.create(b"f", write=True, session=S1)
        service.chunks.write(made, SIZE + 100)
        last = service.chunks.last

        async def slow(chain_id: int, inode: int) -> LastChunk | None:
            found = await last(chain_id, inode)
            await trio.sleep(1)
            return found

        service.chunks.last = slow  # type: ignore[method-assign]

        async def nobody() -> set[bytes]:
            return set()

        async with trio.open_nursery() as nursery:
            if what == "a report":
                request = pb.CloseRequest(inode=made.inode, session=S1, wrote=True, uncertain=True, length=0)
                nursery.start_soon(service.call, "close", request)
            else:
                pruner = make_pruner(service.meta, nobody, grace_s=0)
                nursery.start_soon(pruner.round)
            await trio.sleep(0.5)
            await service.call("set_attr", pb.SetAttrRequest(inode=made.inode, length=0), B)
        assert (await service.stat(made.inode)).length == 0
        assert service.chunks.of(made.inode) == {}

    run(main)


def test_a_dead_clients_file_is_measured_when_its_truncation_was_carried_out() -> None:
    async def main() -> None:
        service = await Service().start()
        made = await _left_undone(service)

        async def nobody() -> set[bytes]:
            return set()

        await make_pruner(service.meta, nobody, grace_s=0).round()
        assert (await service.stat(made.inode)).length == 10

    run(main)


@pytest.mark.parametrize("how", ["a report", "the end of a dead client"])
def test_what_a_failed_write_leaves_later_is_cut_off_by_the_next_truncate(how: str) -> None:
    """A replica had it, was away when the length was measured, and carries it out when it is back. The file grew over it, and showed it."""

    async def main() -> None:
        service = await Service().start()
        made = await service.create(b"f", write=True, session=S1)
        if how == "a report":
            await service.call("close", pb.CloseRequest(inode=made.inode, session=S1, wrote=True, uncertain=True))
        else:
            await make_pruner(service.meta, _nobody, grace_s=0).round()
        assert (await service.stat(made.inode)).length == 0
        service.chunks.write(made, 3 * SIZE)
        opened = (await service.call("open", pb.OpenRequest(inode=made.inode, write=True, truncate=True, session=S2))).inode
        assert service.chunks.of(made.inode) == {}
        await service.write(opened, 10, session=S2)
        service.chunks.calls.clear()
        await service.call("set_attr", pb.SetAttrRequest(inode=made.inode, length=3 * SIZE))
        assert not service.chunks.calls  # nothing can be there any more
        await service.check()

    run(main)


async def _nobody() -> set[bytes]:
    return set()


async def _two_services() -> tuple[Service, Service, pb.Inode]:
    """On one store, with a file of three chunks."""
    first = await Service().start()
    second = await Service(first.engine, first.chunks, seed=8).start()
    await trio.sleep(2)  # leases of an earlier run
    made = await first.create(b"f")
    await first.write(made, 3 * SIZE)
    return first, second, made


@pytest.mark.parametrize("how", ["the background", "a retry"])
def test_two_services_do_not_carry_out_one_truncation_at_once(how: str) -> None:
    """The slower one took what was written after the faster one had said that the file is empty."""

    async def main() -> None:
        first, second, made = await _two_services()
        request = pb.OpenRequest(inode=made.inode, write=True, truncate=True, session=S1)
        first.chunks.delay_s = 0.5

        async def other() -> None:
            await trio.sleep(0.25)
            second.chunks.delay_s = 0.8  # of what is asked for from now on
            if how == "the background":
                await second.meta.cuts.redo_all()
            else:
                await second.call("open", request, request_id=b"r" * 16)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(other)
            opened = (await first.call("open", request, request_id=b"r" * 16)).inode
            assert first.chunks.of(made.inode) == {}
            await first.write(opened, 2 * SIZE, session=S1)
        assert first.chunks.of(made.inode) == {0: SIZE, 1: SIZE}

    run(main)


def test_a_truncation_whose_service_died_half_way_is_carried_out_by_another() -> None:
    async def main() -> None:
        first, second, made = await _two_services()
        first.chunks.delay_s = 1.0
        with trio.move_on_after(0.5):
            await first.call("set_attr", pb.SetAttrRequest(inode=made.inode, length=10))
        first.chunks.delay_s = 0
        await second.call("open", pb.OpenRequest(inode=made.inode, write=True, session=S2))
        assert second.chunks.of(made.inode) == {0: 10}
        assert await second.meta.cuts.redo_all() == 0

    run(main)


def test_a_service_that_lives_and_does_not_reach_the_chains_is_not_waited_for_without_end() -> None:
    async def main() -> None:
        first, second, made = await _two_services()
        unreachable = FakeChunks()
        unreachable.failing = set(CHAINS)
        async with trio.open_nursery() as nursery:
            first.meta.cuts._chunks = unreachable
            nursery.start_soon(housekeeping.run, first.meta, None)
            with pytest.raises(NoServingTarget):
                await first.call("set_attr", pb.SetAttrRequest(inode=made.inode, length=10))
            began_s = trio.current_time()
            await second.call("open", pb.OpenRequest(inode=made.inode, write=True, session=S2))
            assert trio.current_time() - began_s < cuts.WAIT_S_MAX + 2
            assert second.chunks.of(made.inode) == {0: 10}
            nursery.cancel_scope.cancel()

    run(main)


def test_every_try_at_a_truncation_has_a_later_turn() -> None:
    """And knows the chains as they were before it was taken: whoever took it away earlier has told its number to heads that are at least as new."""

    async def main() -> None:
        first, second, made = await _two_services()
        turns: list[Turn] = []
        cut = first.chunks.cut

        async def noted(chain_id: int, inode: int, index: int, length: int, chunk_size: int, turn: Turn) -> None:
            turns.append(turn)
            await cut(chain_id, inode, index, length, chunk_size, turn)

        first.chunks.cut = noted  # type: ignore[method-assign]
        first.chunks.failing = {CHAINS[0]}
        for service, length in ((first, 20), (first, 15), (second, 10)):
            with pytest.raises(NoServingTarget):
                await service.call("set_attr", pb.SetAttrRequest(inode=made.inode, length=length))
        first.chunks.failing = set()
        await second.meta.cuts.redo_all()
        await first.write(made, SIZE)
        await first.call("set_attr", pb.SetAttrRequest(inode=made.inode, length=5))
        numbers = [turn.number for turn in turns]
        assert numbers == sorted(set(numbers)) and len(numbers) > 4
        assert all(turn.routing in (first.routing, second.routing) for turn in turns)

    run(main)
