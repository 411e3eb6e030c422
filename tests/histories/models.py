"""What one object promises: states, and which of them an operation with its outcome may lead to.

Owns three models: a register (a chunk), a block that is created once (KV cache), and a file's length. A model is pure: `step` gives every state that
the operation may lead to from this one, none where its outcome contradicts the state; for an operation whose outcome is unknown, those it would lead
to if it took effect. `simplify` may narrow a history without changing the verdict: it says by when an unknown operation must have taken effect, or
that it does not matter, which is what keeps histories full of unknowns cheap to check.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from tests.histories.history import Operation

State = Hashable
UNSEEN = "(never seen)"


class Model(Protocol):
    @property
    def initial(self) -> State: ...

    def step(self, state: State, operation: Operation) -> Iterable[State]: ...

    def simplify(self, operations: Sequence[Operation]) -> list[Operation]: ...

    def only_looks(self, operation: Operation) -> bool:
        """Whether it never changes the state, whatever that is: then the first moment that fits is as good as any."""
        ...

    def may_leave_out(self, gone: Sequence[Operation], rest: Sequence[Operation]) -> bool:
        """Whether `rest` has an order if `gone` and `rest` together have one: for the explanation of a bad history."""
        ...


@dataclass(frozen=True, slots=True)
class Register:
    """`write` a value, `read` -> the value; None: nothing there. `remove` makes it None again."""

    stale_s: float = 0.0
    """A read may show what was true so long before it was called."""
    initial: State = None

    def step(self, state: State, operation: Operation) -> Iterable[State]:
        match operation.kind:
            case "write":
                return (operation.argument,)
            case "remove":
                return (None,)
            case "read":
                return (state,) if operation.result == state else ()
        raise ValueError(f"a register has no {operation.kind}")

    def only_looks(self, operation: Operation) -> bool:
        return operation.kind == "read"

    def may_leave_out(self, gone: Sequence[Operation], rest: Sequence[Operation]) -> bool:
        seen = {operation.result for operation in rest if operation.kind == "read"}
        return not any(operation.kind != "read" and operation.argument in seen for operation in gone)

    def simplify(self, operations: Sequence[Operation]) -> list[Operation]:
        """An unknown write of a value that no other write has: it took effect before the first read that shows it ended, or nobody can tell."""
        operations = _earlier(operations, "read", self.stale_s)
        times = Counter(operation.argument for operation in operations if operation.kind == "write")
        seen = _first_seen(operations, "read")
        kept = []
        for operation in operations:
            if not operation.known and operation.kind == "write" and times[operation.argument] == 1:
                if operation.argument not in seen:
                    continue
                operation = _by(operation, seen[operation.argument])
            if operation.known or operation.kind != "read":
                kept.append(operation)
        return kept


@dataclass(frozen=True, slots=True)
class CreateOnce:
    """A KV-cache block. `put` a value -> "stored" or "present"; `get` -> the value, None for a miss; `exists` -> bool; `remove`.
    Other bytes than those stored are wrong whatever happened; when a miss is right depends."""

    stale_s: float = 0.0
    """A hit may show a block that was removed so long before the call."""
    evicts: bool = False
    """The store may remove a block at any time by itself."""
    free_misses_until_s: float = float("-inf")
    """Storage trouble is a miss: one that was called earlier than this says nothing."""
    initial: State = None

    def step(self, state: State, operation: Operation) -> Iterable[State]:
        match operation.kind:
            case "put":
                if not operation.known or operation.result == "stored":
                    return (operation.argument,) if state is None or self.evicts else ()
                return (state,) if operation.result == "present" and state is not None else ()
            case "get":
                return self._miss(state, operation) if operation.result is None else (state,) if operation.result == state else ()
            case "exists":
                return self._miss(state, operation) if not operation.result else (state,) if state is not None else ()
            case "remove":
                return (None,)
        raise ValueError(f"a block has no {operation.kind}")

    def _miss(self, state: State, operation: Operation) -> Iterable[State]:
        if state is None or operation.call_s < self.free_misses_until_s:
            return (state,)
        return (None,) if self.evicts else ()

    def only_looks(self, operation: Operation) -> bool:
        if operation.kind == "put":
            return operation.result == "present"
        return operation.kind in ("get", "exists") and not (self.evicts and operation.result in (None, False))

    def may_leave_out(self, gone: Sequence[Operation], rest: Sequence[Operation]) -> bool:
        seen = {operation.result for operation in rest if operation.kind == "get" and operation.result is not None}
        anything = any(operation.result in ("present", True) for operation in rest)
        for operation in gone:
            stores = operation.kind == "put" and operation.result != "present"
            if operation.kind == "remove" or operation.argument in seen or (stores and anything):
                return False
        return True

    def simplify(self, operations: Sequence[Operation]) -> list[Operation]:
        """As for a register; but an unknown put that no get shows may still be why another found the block present: those are all alike."""
        operations = _earlier(operations, "get", self.stale_s)
        times = Counter(operation.argument for operation in operations if operation.kind == "put")
        seen = _first_seen(operations, "get")
        kept = []
        for operation in operations:
            if not operation.known and operation.kind == "put" and times[operation.argument] == 1:
                operation = _by(operation, seen[operation.argument]) if operation.argument in seen else replace(operation, argument=UNSEEN)
            if operation.known or operation.kind not in ("get", "exists"):
                kept.append(_stored(operation))
        return kept


def _stored(operation: Operation) -> Operation:
    """A put that was not answered but is known to have taken effect stored the block."""
    return replace(operation, result="stored") if operation.kind == "put" and operation.result not in ("stored", "present") else operation


@dataclass(frozen=True, slots=True)
class FileLength:
    """`append` n bytes -> the offset where they went, or None; `extend` to at least n bytes (a write that ends there); `truncate`
    to n; `length` -> n. Unknown appends of one size are cheap to check, of many sizes they are not."""

    initial: State = 0

    def step(self, state: State, operation: Operation) -> Iterable[State]:
        assert isinstance(state, int)
        count = operation.argument
        if operation.kind == "length":
            return (state,) if operation.result == state else ()
        assert isinstance(count, int)
        match operation.kind:
            case "append":
                return (state + count,) if not operation.known or operation.result in (None, state) else ()
            case "extend":
                return (max(state, count),)
            case "truncate":
                return (count,)
        raise ValueError(f"a file's length has no {operation.kind}")

    def only_looks(self, operation: Operation) -> bool:
        return operation.kind == "length"

    def may_leave_out(self, gone: Sequence[Operation], rest: Sequence[Operation]) -> bool:
        return all(operation.kind == "length" for operation in gone)

    def simplify(self, operations: Sequence[Operation]) -> list[Operation]:
        return [operation for operation in operations if operation.known or operation.kind != "length"]


def _earlier(operations: Sequence[Operation], kind: str, by_s: float) -> list[Operation]:
    """With reads of this kind that saw something begun so much earlier."""
    return [
        replace(operation, call_s=operation.call_s - by_s) if by_s and operation.kind == kind and operation.result is not None else operation
        for operation in operations
    ]


def _first_seen(operations: Sequence[Operation], kind: str) -> dict[Hashable, float]:
    """When each value was surely there: the earliest end of a read that shows it."""
    seen: dict[Hashable, float] = {}
    for operation in operations:
        if operation.kind == kind and operation.end_s is not None:
            seen[operation.result] = min(seen.get(operation.result, operation.end_s), operation.end_s)
    return seen


def _by(operation: Operation, seen_s: float) -> Operation:
    """It took effect before that. One that was seen before it was called stays as it is: no order will explain it."""
    return replace(operation, end_s=seen_s) if seen_s >= operation.call_s else operation
