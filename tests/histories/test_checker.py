"""The checker finds every kind of wrong history, and takes every right one, also where outcomes are unknown."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from tests.histories.checker import Undecided, check, first_unexplained
from tests.histories.explain import explain, report, shrink
from tests.histories.history import History, Operation, Value, dump, fill, load, name_of
from tests.histories.models import CreateOnce, FileLength, Model, Register

UNKNOWN = None
Line = tuple[str, Value, Value, float, float | None]


def history(*lines: Line) -> list[Operation]:
    """Each: kind, argument, result, call, end. Every operation has a client of its own."""
    return [Operation(f"c{number}", "x", *line) for number, line in enumerate(lines)]


GOOD: dict[str, tuple[Model, list[Operation]]] = {
    "reads while a write is under way may differ": (
        Register(),
        history(("write", "a", None, 0, 9), ("read", None, None, 1, 2), ("read", None, "a", 3, 4), ("write", "b", None, 10, 11),
            ("read", None, "b", 12, 13)),
    ),
    "an unknown write takes effect late": (
        Register(),
        history(("write", "a", None, 0, 1), ("write", "b", None, 2, UNKNOWN), ("read", None, "a", 50, 51), ("read", None, "b", 60, 61)),
    ),
    "an unknown write never takes effect": (Register(), history(("write", "a", None, 0, 1), ("write", "b", None, 2, UNKNOWN),
        ("read", None, "a", 50, 51))),
    "an unknown write is overwritten unseen": (
        Register(),
        history(("write", "b", None, 0, UNKNOWN), ("write", "a", None, 1, 2), ("read", None, "a", 3, 4), ("read", None, "b", 5, 6),
            ("write", "c", None, 7, 8)),
    ),
    "the same value written twice": (
        Register(),
        history(("write", "a", None, 0, 1), ("write", "b", None, 2, 3), ("write", "a", None, 4, UNKNOWN), ("read", None, "b", 5, 6),
            ("read", None, "a", 7, 8)),
    ),
    "a read may be a little stale where that is promised": (
        Register(stale_s=0.2),
        history(("write", "a", None, 0, 1), ("write", "b", None, 2, 3), ("read", None, "a", 3.1, 3.15), ("read", None, "b", 4, 5)),
    ),
    "removed": (Register(), history(("write", "a", None, 0, 1), ("remove", None, None, 2, 3), ("read", None, None, 4, 5))),
    "one of two creators wins": (
        CreateOnce(),
        history(("put", "a", "stored", 0, 5), ("put", "b", "present", 1, 6), ("get", None, None, 0, 2), ("get", None, "a", 7, 8)),
    ),
    "created anew after a removal": (
        CreateOnce(),
        history(("put", "a", "stored", 0, 1), ("remove", None, None, 2, 3), ("get", None, None, 4, 5), ("put", "b", "stored", 6, 7),
            ("get", None, "b", 8, 9)),
    ),
    "present because of a put that was never answered": (
        CreateOnce(),
        history(("put", "a", None, 0, UNKNOWN), ("put", "b", "present", 1, 2), ("get", None, "a", 3, 4)),
    ),
    "present because of one of many, and nobody saw which": (
        CreateOnce(), history(*(("put", f"a{n}", None, n, UNKNOWN) for n in range(200)), ("put", "b", "present", 300, 301),
            ("exists", None, True, 302, 303))
    ),
    "evicted, stored again": (
        CreateOnce(evicts=True),
        history(("put", "a", "stored", 0, 1), ("get", None, None, 2, 3), ("put", "b", "stored", 4, 5), ("put", "c", "stored", 6, 7),
            ("get", None, "c", 8, 9)),
    ),
    "a miss in time of trouble": (
        CreateOnce(free_misses_until_s=3), history(("put", "a", "stored", 0, 1), ("get", None, None, 2, 4), ("exists", None, False, 2, 4),
            ("get", None, "a", 5, 6))
    ),
    "a removed block is read for a moment": (
        CreateOnce(stale_s=1.5),
        history(("put", "a", "stored", 0, 1), ("remove", None, None, 2, 3), ("get", None, "a", 4, 4.1), ("get", None, None, 4.2, 4.3)),
    ),
    "appended side by side": (
        FileLength(),
        history(("append", 5, 7, 0, 3), ("append", 7, 0, 1, 4), ("length", None, 12, 5, 6), ("truncate", 3, None, 7, 8),
            ("extend", 2, None, 8, 9), ("length", None, 3, 10, 11)),
    ),
    "many unknown appends of one size": (
        FileLength(), history(*(("append", 4, None, n, UNKNOWN) for n in range(200)), ("length", None, 40, 300, 301), ("length", None, 44, 302, 303))
    ),
}  # fmt: skip

BAD: dict[str, tuple[Model, list[Operation], str]] = {
    "stale read": (
        Register(),
        history(("write", "a", None, 0, 1), ("write", "b", None, 2, 3), ("read", None, "a", 4, 5)),
        "had been replaced",
    ),
    "stale for longer than promised": (
        Register(stale_s=0.2),
        history(("write", "a", None, 0, 1), ("write", "b", None, 2, 3), ("read", None, "a", 3.3, 3.4)),
        "had been replaced",
    ),
    "back in time: an older value after a newer one, while the write is under way": (
        Register(),
        history(("write", "a", None, 0, 1), ("write", "b", None, 2, 9), ("read", None, "b", 3, 4), ("read", None, "a", 5, 6)),
        "had been replaced",
    ),
    "lost write": (Register(), history(("write", "a", None, 0, 1), ("read", None, None, 2, 3)), "contradicts every state"),
    "lost again after it was seen": (
        Register(),
        history(("write", "a", None, 0, UNKNOWN), ("read", None, "a", 2, 3), ("read", None, None, 4, 5)),
        "contradicts every state",
    ),
    "torn value": (
        Register(),
        history(("write", "a", None, 0, 1), ("write", "b", None, 0, 1), ("read", None, "TORN a but b", 2, 3)),
        "Nobody ever wrote",
    ),
    "read from the future": (
        Register(),
        history(("write", "a", None, 0, 1), ("read", None, "b", 2, 3), ("write", "b", None, 4, 5)),
        "before anyone began to write",
    ),
    "unknown write read from the future": (
        Register(),
        history(("write", "a", None, 0, 1), ("read", None, "b", 2, 3), ("write", "b", None, 4, UNKNOWN)),
        "before anyone began to write",
    ),
    "an unknown write takes effect twice": (
        Register(),
        history(("write", "b", None, 0, UNKNOWN), ("read", None, "b", 1, 2), ("write", "a", None, 3, 4), ("read", None, "a", 5, 6),
            ("read", None, "b", 7, 8)),
        "had been replaced",
    ),
    "two readers disagree on the order of two writes": (
        Register(),
        history(
            ("write", "a", None, 0, 20), ("write", "b", None, 0, 20),
            ("read", None, "a", 1, 2), ("read", None, "b", 3, 4), ("read", None, "a", 5, 6),
        ),
        "had been replaced",
    ),
    "two winners of create": (
        CreateOnce(), history(("put", "a", "stored", 0, 5), ("put", "b", "stored", 1, 6)), "put with the outcome stored",
    ),
    "the loser's bytes": (
        CreateOnce(), history(("put", "a", "stored", 0, 1), ("put", "b", "present", 2, 3), ("get", None, "b", 4, 5)), "had not taken effect",
    ),
    "present without anyone": (CreateOnce(), history(("put", "a", "present", 0, 1), ("put", "b", None, 2, UNKNOWN)), "put with the outcome present"),
    "a block's bytes change": (
        CreateOnce(free_misses_until_s=99),
        history(("put", "a", None, 0, UNKNOWN), ("put", "b", None, 0, UNKNOWN), ("get", None, "a", 1, 2), ("get", None, None, 2, 3),
            ("get", None, "b", 4, 5)),
        "when no order has room for it",
    ),
    "an acknowledged block is lost": (CreateOnce(), history(("put", "a", "stored", 0, 1), ("get", None, None, 2, 3)), "contradicts every state"),
    "a removed block is read for too long": (
        CreateOnce(stale_s=1.5), history(("put", "a", "stored", 0, 1), ("remove", None, None, 2, 3),
            ("get", None, "a", 4.6, 4.7)), "had been replaced or removed",
    ),
    "another block's bytes": (CreateOnce(evicts=True), history(("put", "a", "stored", 0, 1), ("get", None, "z", 2, 3)), "Nobody ever wrote"),
    "an append applied twice": (FileLength(), history(("append", 5, None, 0, 1), ("length", None, 10, 2, 3)), "length with the outcome 10"),
    "two appends at one offset": (FileLength(), history(("append", 5, 0, 0, 3), ("append", 5, 0, 1, 4)), "append with the outcome 0"),
    "a length from before a truncation": (
        FileLength(), history(("extend", 9, None, 0, 1), ("truncate", 3, None, 2, 3), ("length", None, 9, 4, 5)), "length with the outcome 9",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_a_right_history_is_taken(name: str) -> None:
    model, operations = GOOD[name]
    assert first_unexplained(operations, model) is None


@pytest.mark.parametrize("name", BAD)
def test_a_wrong_history_is_found_and_told(name: str) -> None:
    model, operations, why = BAD[name]
    [bad] = check(operations, lambda key: model)
    assert why in explain(bad)


def simulated(seed: int, count: int, *, unknown: float = 0.0) -> list[Operation]:
    """A register that is right, as `count` operations of five clients see it: each takes effect at one moment between its call and its end."""
    chance = random.Random(seed)
    free = [0.0] * 5
    moments = []
    for number in range(count):
        client = min(range(5), key=free.__getitem__)
        call = free[client] + chance.random()
        moment = call + chance.random()
        free[client] = moment + chance.random()
        moments.append((moment, call, free[client], client, number))
    state: Value = None
    found = []
    for moment, call, end, client, number in sorted(moments):
        if chance.random() < 0.5:
            found.append(Operation(f"c{client}", "x", "read", None, state, call, end))
        elif chance.random() < unknown:
            if chance.random() < 0.5:  # else it never takes effect
                state = f"v{number}"
            found.append(Operation(f"c{client}", "x", "write", f"v{number}", None, call, None))
        else:
            state = f"v{number}"
            found.append(Operation(f"c{client}", "x", "write", state, None, call, end))
        assert call <= moment <= end
    return found


@pytest.mark.parametrize("unknown", [0.0, 0.2])
def test_a_thousand_operations_of_five_clients_in_well_under_a_second(unknown: float) -> None:
    operations = simulated(1, 1000, unknown=unknown)
    started = time.process_time()
    assert first_unexplained(operations, Register()) is None
    assert time.process_time() - started < 0.5


def test_right_histories_are_taken_and_one_that_is_spoilt_is_found() -> None:
    """Spoilt: a read shows a value that was overwritten, and the overwriting seen, before it was called."""
    for seed in range(30):
        operations = simulated(seed, 120, unknown=0.1)
        assert first_unexplained(operations, Register()) is None, f"seed {seed}"
        reads = [at for at, operation in enumerate(operations) if operation.kind == "read" and operation.result is not None]
        spoilt = operations[reads[-1]]
        old = next(operation for operation in operations if operation.kind == "read" and operation.result is not None).result
        operations[reads[-1]] = replace(spoilt, result=old)
        assert first_unexplained(operations, Register()) is not None, f"seed {seed}"


def test_agrees_with_trying_every_order() -> None:
    """Small random histories, right or wrong, against the definition itself."""
    verdicts = set()
    for seed in range(1500):
        chance = random.Random(seed)
        operations = []
        for number in range(5):
            call = chance.randrange(6)
            kind = chance.choice(("write", "read"))
            value = chance.choice(("a", "b", "c"))
            end = None if kind == "write" and chance.random() < 0.3 else call + chance.randrange(1, 5) + 0.5
            operations.append(Operation(f"c{number}", "x", kind, value if kind == "write" else None, value if kind == "read" else None, call, end))
        expected = _has_order(operations, None)
        assert (first_unexplained(operations, Register()) is None) == expected, operations
        verdicts.add(expected)
    assert verdicts == {True, False}


def _has_order(left: Sequence[Operation], state: Value) -> bool:
    """The definition: someone goes first whom nobody's end precedes; an operation without an end may be left out."""
    if not any(operation.known for operation in left):
        return True
    first_end = min(operation.end_s for operation in left if operation.end_s is not None)
    for at, operation in enumerate(left):
        if operation.call_s <= first_end and (operation.kind == "write" or operation.result == state):
            reached = operation.argument if operation.kind == "write" else state
            if _has_order([*left[:at], *left[at + 1 :]], reached):
                return True
    return False


def test_a_wrong_history_shrinks_to_what_is_wrong_and_is_dumped(tmp_path: Path) -> None:
    operations = simulated(3, 400)
    last = max(operation.end_s or 0 for operation in operations)
    old = next(operation.argument for operation in operations if operation.kind == "write")
    operations.append(Operation("c9", "x", "read", None, old, last + 1, last + 2))
    assert [str(operation.argument or operation.result) for operation in shrink(operations, Register())].count(str(old)) == 2
    assert len(shrink(operations, Register())) == 3
    text = report(check(operations, lambda key: Register()), tmp_path / "bad.jsonl")
    assert f"read -> {old}" in text and "3 operations" in text
    assert load(tmp_path / "bad.jsonl") == operations


def test_too_many_unknowns_are_no_proof() -> None:
    operations = history(*(("append", 1 << n, None, n, UNKNOWN) for n in range(20)), ("length", None, -1, 300, 301))
    with pytest.raises(Undecided):
        first_unexplained(operations, FileLength(), limit=10_000)


def test_a_recorder_orders_what_a_standing_clock_does_not(tmp_path: Path) -> None:
    recorder = History(lambda: 5.0)
    first = recorder.call("c", "x", "write", "a")
    first.done()
    hanging = recorder.call("c", "x", "write", "b")
    recorder.call("c", "x", "write", "d").never()
    recorder.call("c", "x", "read").done("a")
    operations = recorder.operations()
    assert [operation.known for operation in operations] == [True, False, True] and hanging.ended
    assert operations[0].end_s is not None and operations[0].end_s < operations[2].call_s
    dump(operations, tmp_path / "h")
    assert load(tmp_path / "h") == operations


def test_bytes_of_a_value_are_known_and_torn_ones_are_told() -> None:
    for length in (1 + len("a|0|"), 64, 1000, 70_000):
        assert name_of(fill("a", length)) == "a"
    assert name_of(b"") is None
    torn = name_of(fill("a", 640) + fill("b", 1280)[640:])
    assert torn is not None and torn.startswith("TORN a but at byte 640")
    moved = name_of(fill("a", 640)[:320] + fill("a", 640)[:320])
    assert moved is not None and moved.startswith("TORN a but at byte 320")
