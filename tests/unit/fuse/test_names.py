"""Names in the kernel: what is granted, what is taken back and how, and that taking back stays rare."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import trio
import trio.testing

from kvfs.fuse import protocol
from kvfs.fuse.invalidate import THREADS, Invalidator
from kvfs.fuse.names import (
    DIRECTORIES_MAX,
    EXPIRE_WITHIN_S,
    NAMES_MAX,
    OWN_CHANGE_S,
    PAUSE_FIRST_S,
    PAUSE_MAX_S,
    RECALLS_MAX,
    SETTLED_S,
    KernelNames,
)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def names(clock: Clock) -> KernelNames:
    return KernelNames(clock)


def grant(names: KernelNames, directory: int, name: bytes, lease_s: float = 0.9, *, is_directory: bool = False) -> float:
    return names.grant(directory, name, lease_s, is_directory=is_directory)


def recalled(names: KernelNames, directory: int) -> set[bytes]:
    recall = names.recall(directory)
    return set() if recall is None else set(recall.names)


def test_all_that_was_granted_and_is_not_over_is_taken_back(names: KernelNames, clock: Clock) -> None:
    assert grant(names, 1, b"short", 0.2) == 0.2 and grant(names, 1, b"long", 0.9) == 0.9 and grant(names, 2, b"other") == 0.9
    assert grant(names, 1, b"none", 0.0) == 0.0
    clock.now += 0.3
    recall = names.recall(1)
    assert recall is not None and recall.names == [b"long"] and recall.settled_at == clock.now - 0.3 + SETTLED_S
    assert names.recall(1) is None, "once is enough"
    assert recalled(names, 2) == {b"other"} and names.recall(77) is None


def test_an_answer_without_a_grant_replaces_an_earlier_grant(names: KernelNames) -> None:
    grant(names, 1, b"a")
    grant(names, 1, b"b")
    grant(names, 1, b"a", 0.0)
    assert recalled(names, 1) == {b"b"}


def test_directory_that_others_change_is_left_alone_twice_as_long_each_time(names: KernelNames, clock: Clock) -> None:
    pause = PAUSE_FIRST_S
    for _ in range(12):
        assert grant(names, 1, b"a") > 0
        assert recalled(names, 1) == {b"a"}
        clock.now += pause - 0.1
        assert grant(names, 1, b"a") == 0 and grant(names, 1, b"d", is_directory=True) == 0 and grant(names, 2, b"a") > 0
        clock.now += 0.2
        pause = min(2 * pause, PAUSE_MAX_S)
    clock.now += 5 * PAUSE_MAX_S
    assert grant(names, 1, b"a") > 0 and recalled(names, 1) == {b"a"}
    clock.now += PAUSE_FIRST_S + 0.1
    assert grant(names, 1, b"a") > 0, "after a long peace it begins anew"


def test_directory_that_this_mount_changes_keeps_only_its_directories(names: KernelNames, clock: Clock) -> None:
    names.changing(1)
    assert grant(names, 1, b"f") == 0 and grant(names, 1, b"d", is_directory=True) > 0
    clock.now += OWN_CHANGE_S
    assert grant(names, 1, b"f") > 0


def test_grants_move_with_the_names(names: KernelNames, clock: Clock) -> None:
    grant(names, 1, b"a", 0.5)
    names.moved(1, b"a", 2, b"b")
    assert names.recall(1) is None and recalled(names, 2) == {b"b"}
    clock.now += PAUSE_FIRST_S + 1
    grant(names, 1, b"x", 0.2)
    grant(names, 2, b"y", 0.8)
    names.moved(1, b"x", 2, b"y", exchanged=True)
    clock.now += 0.3
    assert names.recall(2) is None and recalled(names, 1) == {b"x"}
    names.moved(5, b"never", 6, b"granted")


def test_many_recalls_pause_the_mount(names: KernelNames, clock: Clock) -> None:
    for directory in range(RECALLS_MAX):
        assert grant(names, directory, b"a") > 0
        assert recalled(names, directory) == {b"a"}
    assert grant(names, 1000, b"a") == 0
    clock.now += PAUSE_FIRST_S
    assert grant(names, 1000, b"a") > 0


def test_tables_are_bounded(names: KernelNames, clock: Clock) -> None:
    granted = [grant(names, 1, b"%d" % number) for number in range(NAMES_MAX + 10)]
    assert granted[NAMES_MAX - 1] > 0 and granted[NAMES_MAX:] == [0] * 10
    clock.now += 1
    assert grant(names, 1, b"later") > 0
    for directory in range(2, DIRECTORIES_MAX + 1):
        assert grant(names, directory, b"a") > 0
    assert grant(names, DIRECTORIES_MAX + 1, b"a") == 0
    clock.now += 1
    assert grant(names, DIRECTORIES_MAX + 1, b"a") > 0


def test_a_restarted_service_takes_all_back(names: KernelNames, clock: Clock) -> None:
    assert not names.lose_all()
    grant(names, 1, b"a")
    assert names.lose_all() and not names.lose_all()
    grant(names, 1, b"a", 0.1)
    clock.now += 1
    assert not names.lose_all(), "it is over anyway"


class Device:
    """The kernel's side: records notifications; a thread may be held up in one."""

    def __init__(self) -> None:
        self.told: list[bytes] = []
        self.blocked = threading.Event()
        self.blocked.set()

    def notify(self, message: bytes) -> None:
        if message[4] == protocol.Notify.INVAL_ENTRY:
            self.blocked.wait(10)
        self.told.append(message)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """An operation of this mount holds the directory's lock."""
        self.blocked.clear()
        try:
            yield
        finally:
            self.blocked.set()


class Client:
    def on_revoked(self, callback: Any) -> None: ...


def with_invalidator(test: Any) -> None:
    async def main() -> None:
        device = Device()
        names = KernelNames(trio.current_time)
        invalidator = Invalidator(device.notify, names)
        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                await nursery.start(invalidator.run, Client())
                await test(device, names, invalidator)
                nursery.cancel_scope.cancel()

    trio.run(main)


def test_names_are_expired_one_by_one_once_they_have_settled() -> None:
    async def test(device: Device, names: KernelNames, invalidator: Invalidator) -> None:
        started = trio.current_time()
        grant(names, 1, b"a")
        grant(names, 1, b"b")
        await invalidator.revoked(1, b"")
        assert trio.current_time() - started >= SETTLED_S
        assert device.told == [
            protocol.inval_entry(1, b"a", expire_only=True),
            protocol.inval_entry(1, b"b", expire_only=True),
            protocol.inval_inode(1, attributes_only=False),
        ]
        started = trio.current_time()
        await invalidator.revoked(9, b"")
        assert trio.current_time() - started < SETTLED_S, "nothing to wait for"

    with_invalidator(test)


def test_where_the_directory_is_locked_all_names_go_and_the_acknowledgement_does_not_wait() -> None:
    async def test(device: Device, names: KernelNames, invalidator: Invalidator) -> None:
        for turn in range(THREADS + 2):  # also when every thread is held up
            grant(names, turn, b"a")
        with device.locked():
            for turn in range(THREADS + 2):
                started = trio.current_time()
                await invalidator.revoked(turn, b"")
                assert trio.current_time() - started < SETTLED_S + EXPIRE_WITHIN_S + 1
                assert device.told == [protocol.inc_epoch(), protocol.inval_inode(turn, attributes_only=False)]
                device.told.clear()

    with_invalidator(test)


def test_refusals_of_the_kernel_are_nothing() -> None:
    async def main() -> None:
        def refuse(message: bytes) -> None:
            raise OSError(2, "not known")

        names = KernelNames(trio.current_time)
        invalidator = Invalidator(refuse, names)
        async with trio.open_nursery() as nursery:
            await nursery.start(invalidator.run, Client())
            grant(names, 1, b"a")
            await invalidator.revoked(1, b"")
            await invalidator.data_now(1)
            nursery.cancel_scope.cancel()
        await invalidator.data_now(1)  # after the end nobody is told

    trio.run(main)
