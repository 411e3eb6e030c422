"""A bad history told so that a person sees what is wrong: the fewest operations that are still bad, and what speaks against the first that nothing
explains.

Owns the shrinking and the text. Only what the model may do without is left out (a read; a write whose value nobody that is left saw), so what is
shown is wrong for a reason that the whole history has.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tests.histories.checker import Bad, Undecided, first_unexplained
from tests.histories.history import Operation, dump
from tests.histories.models import Model

SHOWN_MAX = 60


def report(bad: Sequence[Bad], path: Path) -> str:
    """For a failed test: every operation of the bad objects goes to `path` as JSON lines, the text says the least that is wrong."""
    dump([operation for each in bad for operation in each.operations], path)
    return "\n\n".join(explain(each) for each in bad) + f"\n\nall operations of these objects: {path}"


def explain(bad: Bad) -> str:
    least = shrink(bad.operations, bad.model)
    stuck = first_unexplained(least, bad.model) or bad.stuck
    lines = [
        f"{bad.key}: no order of its {len(bad.operations)} operations explains all that was seen.",
        f"Nothing explains {stuck}",
        _why(stuck, least),
    ]
    lines.append(f"The least that is still wrong, {len(least)} operations:")
    lines += [f"  {operation}" for operation in least[:SHOWN_MAX]]
    if len(least) > SHOWN_MAX:
        lines.append(f"  ... and {len(least) - SHOWN_MAX} more")
    return "\n".join(lines)


def _why(stuck: Operation, operations: Sequence[Operation]) -> str:
    """The usual suspects, from what the operation itself says."""
    sights = [operation for operation in operations if operation.kind in ("read", "get") and operation.result == stuck.argument]
    if stuck.kind in ("write", "put") and sights:
        return f"  {stuck.argument!r} was seen by {sights[0].client} at {sights[0].end_s:.6f}, when no order has room for it."
    if stuck.kind not in ("read", "get") or stuck.result is None:
        return f"  {stuck.kind} with the outcome {stuck.result} contradicts every state that the object can have been in."
    writers = [operation for operation in operations if operation.kind in ("write", "put") and operation.argument == stuck.result]
    if not writers:
        return f"  Nobody ever wrote {stuck.result!r}."
    if all(stuck.end_s is not None and writer.call_s > stuck.end_s for writer in writers):
        return f"  {stuck.result!r} was read before anyone began to write it."
    return f"  {stuck.result!r} had been replaced or removed before this read began, or had not taken effect when an earlier read ended."


def shrink(operations: Sequence[Operation], model: Model) -> list[Operation]:
    """Ever smaller pieces are left out as long as the rest is bad."""
    kept = sorted(operations, key=lambda operation: operation.call_s)
    piece = max(1, len(kept) // 2)
    while True:
        smaller = _without_pieces(kept, piece, model)
        if len(smaller) == len(kept) and piece == 1:
            return kept
        kept, piece = smaller, max(1, piece // 2)


def _without_pieces(operations: list[Operation], piece: int, model: Model) -> list[Operation]:
    kept = operations
    at = 0
    while at < len(kept):
        gone, rest = kept[at : at + piece], kept[:at] + kept[at + piece :]
        if model.may_leave_out(gone, rest) and _is_bad(rest, model):
            kept = rest
        else:
            at += piece
    return kept


def _is_bad(operations: Sequence[Operation], model: Model) -> bool:
    try:
        return first_unexplained(operations, model) is not None
    except Undecided:
        return False
