"""Bringing a returning target up to date, without I/O: one attempt of the predecessor's dialogue with it.

sync-start, then both lists of chunks page by page, what differs sent in batches meanwhile, then sync-done. The service (storage/resync.py) and the
chain's model in the tests drive exactly this; whoever loses an answer on the way drops the attempt and begins another.
Invariants: nothing is compared before every update that was under way when the successor came has ended, since those do not pass to it; sync-done is
asked for only when both lists were compared to their ends and every batch was acknowledged; batches under way are bounded, and no page is asked for
while more of them wait. What a chunk is sent as is decided when it is sent, under its lock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence

from kvfs.common.values import value
from kvfs.storage.chain.compare import Listed, Side, take_differences
from kvfs.storage.chain.flight import Flight
from kvfs.storage.engine.requests import UpdateKind

BATCH_CHUNKS = 256


@value
class AskStart:
    """Tell the successor that it begins. -> started"""


@value
class ListPage:
    """The chunks after this one, in order: those here, or the successor's. -> page"""

    here: bool
    after: bytes


@value
class Send:
    """Make these chunks there what they are here now. -> sent"""

    chunks: tuple[bytes, ...]


@value
class AskDone:
    """Tell the successor that it is up to date, with the records of all channels. -> done"""


CopyEffect = AskStart | ListPage | Send | AskDone


def drained(before: Iterable[Flight]) -> bool:
    """Whether the updates that were under way when the successor came have ended: only then may an attempt begin."""
    return all(flight.done for flight in before)


def sent_as(version: int) -> UpdateKind:
    """What makes a chunk there what it is here. `version`: the one committed here, 0: none."""
    return UpdateKind.REPLACE if version else UpdateKind.REMOVE


class Copying:
    def __init__(self, *, at_once: int, batch_bytes: int, batch_chunks: int = BATCH_CHUNKS) -> None:
        self.over = False
        self.chunks_done = 0
        """Compared and equal, or sent and acknowledged."""
        self.chunks_sent = 0
        self._at_once = at_once
        self._batch_bytes = batch_bytes
        self._batch_chunks = batch_chunks
        self._here = Side.empty()
        self._there = Side.empty()
        self._ready: deque[tuple[bytes, ...]] = deque()
        self._under_way = 0
        self._listing = False
        self._asked = False

    def begin(self) -> list[CopyEffect]:
        return [AskStart()]

    def started(self) -> list[CopyEffect]:
        return self._go_on()

    def page(self, here: bool, chunks: Sequence[Listed], last: bytes, more: bool) -> list[CopyEffect]:
        """`chunks`: those with a committed version. One that is only pending is not a chunk yet: its update passes to the successor by itself.
        `last`: the id up to which the page reaches."""
        self._listing = False
        side = self._here if here else self._there
        side.add_page(chunks, more)
        side.known = last or side.known
        lengths = {chunk: listed.length for chunk, listed in self._here.entries.items()}
        differing, compared = take_differences(self._here, self._there)
        self.chunks_done += compared - len(differing)
        self._pack(differing, lengths)
        return self._go_on()

    def sent(self, chunks: Sequence[bytes]) -> list[CopyEffect]:
        self._under_way -= 1
        self.chunks_done += len(chunks)
        self.chunks_sent += len(chunks)
        return self._go_on()

    def done(self) -> list[CopyEffect]:
        self.over = True
        return []

    def _pack(self, differing: Sequence[bytes], lengths: Mapping[bytes, int]) -> None:
        batch: list[bytes] = []
        room = 0
        for chunk in differing:
            length = lengths.get(chunk, 0)
            if batch and (length > room or len(batch) >= self._batch_chunks):
                self._ready.append(tuple(batch))
                batch = []
            if not batch:
                room = self._batch_bytes
            batch.append(chunk)
            room -= length
        if batch:
            self._ready.append(tuple(batch))

    def _go_on(self) -> list[CopyEffect]:
        effects: list[CopyEffect] = []
        while self._ready and self._under_way < self._at_once:
            self._under_way += 1
            effects.append(Send(self._ready.popleft()))
        if self._ready or self._listing or self._asked:
            return effects
        here, there = self._here, self._there
        if here.more or there.more:
            self._listing = True
            mine = here.more and (not there.more or here.known <= there.known)
            effects.append(ListPage(mine, (here if mine else there).known))
        elif not self._under_way:
            self._asked = True
            effects.append(AskDone())
        return effects
