"""Is there an order? The search of Wing, Gong and Lowe for an order of one object's operations that keeps real time and explains every outcome.

Owns the search, nothing of what operations mean (models.py). It goes through calls and ends by time and keeps every configuration that is still
possible: the object's state, and which of the operations under way have taken effect (Lowe's just-in-time order, memoised: equal configurations are
one). An operation must have taken effect when it ends, so each end narrows the set; when none is left, that operation is the first that nothing
explains. Invariants:
  - an operation without an end may take effect at any time after its call, or never;
  - of unknown operations that do the same, the earliest takes effect first: it can stand in for any other;
  - what only looks takes effect as soon as the state fits: later is no better;
  - a search that grows past `LIMIT` raises Undecided: it never passes for a good history.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from tests.histories.history import Operation
from tests.histories.models import Model, State

LIMIT = 100_000
"""Configurations at one moment."""

Configuration = tuple[State, frozenset[int]]


class Undecided(Exception):
    """Too many unknown operations overlap: neither good nor bad is proved."""


@dataclass(frozen=True, slots=True)
class Bad:
    """No order explains what was seen of this object."""

    key: str
    model: Model
    operations: tuple[Operation, ...]
    """All of the object, as recorded."""
    stuck: Operation
    """The first to end that nothing explains, given all before."""


def check(operations: Iterable[Operation], model_of: Callable[[str], Model]) -> list[Bad]:
    """Each object by itself: linearizability is local. `model_of` gives the model of a key."""
    by_key: dict[str, list[Operation]] = defaultdict(list)
    for operation in operations:
        by_key[operation.key].append(operation)
    found = []
    for key, group in sorted(by_key.items()):
        model = model_of(key)
        stuck = first_unexplained(group, model)
        if stuck is not None:
            found.append(Bad(key, model, tuple(group), stuck))
    return found


def first_unexplained(recorded: Sequence[Operation], model: Model, *, limit: int = LIMIT) -> Operation | None:
    """None: an order explains them all."""
    operations = sorted(model.simplify(recorded), key=lambda operation: operation.call_s)
    under_way: dict[int, Operation] = {}
    configurations: set[Configuration] = {(model.initial, frozenset())}
    for _, is_end, number in _events(operations):
        if not is_end:
            under_way[number] = operations[number]
            continue
        configurations = _after_end(configurations, number, under_way, model, limit)
        if not configurations:
            return operations[number]
        del under_way[number]
    return None


def _events(operations: Sequence[Operation]) -> list[tuple[float, bool, int]]:
    """Calls and ends by time. At the same moment calls come first: those two may have been under way together."""
    events = [(operation.call_s, False, number) for number, operation in enumerate(operations)]
    events += [(operation.end_s, True, number) for number, operation in enumerate(operations) if operation.end_s is not None]
    return sorted(events)


def _after_end(configurations: set[Configuration], number: int, under_way: dict[int, Operation], model: Model, limit: int) -> set[Configuration]:
    """Every configuration in which that operation has taken effect, reached by letting some of those under way take effect before it."""
    looks = [(other, operation) for other, operation in under_way.items() if model.only_looks(operation)]

    def settled(state: State, effective: frozenset[int]) -> Configuration:
        return state, effective.union(other for other, operation in looks if other not in effective and model.step(state, operation))

    after: set[Configuration] = set()
    seen = {settled(*configuration) for configuration in configurations}
    stack = list(seen)
    while stack:
        state, effective = stack.pop()
        if number in effective:
            after.add((state, effective - {number}))
            continue
        for other, operation in _candidates(under_way, effective, model):
            for reached in model.step(state, operation):
                if operation.known or reached != state:  # an unknown one that changes nothing may as well not have happened
                    configuration = settled(reached, effective | {other})
                    if configuration not in seen:
                        seen.add(configuration)
                        stack.append(configuration)
        if len(seen) > limit:
            raise Undecided(f"more than {limit} ways to explain {under_way[number].key} up to: {under_way[number]}")
    return after


def _candidates(under_way: dict[int, Operation], effective: frozenset[int], model: Model) -> list[tuple[int, Operation]]:
    """Those that may change the state next."""
    found = []
    alike = set()
    for number, operation in under_way.items():
        if number in effective or model.only_looks(operation):
            continue
        if not operation.known:
            what = (operation.kind, operation.argument)
            if what in alike:
                continue
            alike.add(what)
        found.append((number, operation))
    return found
