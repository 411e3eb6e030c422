"""The order in which a resync asks, lists and sends: what the dialogues, whose chunks fit one page and go one by one, do not show."""

from __future__ import annotations

from kvfs.storage.chain.compare import Listed
from kvfs.storage.chain.copying import AskDone, AskStart, Copying, ListPage, Send, sent_as
from kvfs.storage.engine.requests import UpdateKind


def listed(*names: str, version: int = 1, length: int = 10) -> list[Listed]:
    return [Listed(name.encode(), version, length, 7) for name in names]


def started(**more: int) -> Copying:
    copying = Copying(**{"at_once": 2, "batch_bytes": 20, **more})
    assert copying.begin() == [AskStart()]
    assert copying.started() == [ListPage(True, b"")]
    return copying


def test_pages_alternate_and_nothing_behind_the_shorter_one_is_judged() -> None:
    copying = started()
    assert copying.page(True, listed("a", "b", "d"), b"d", True) == [ListPage(False, b"")]
    assert copying.page(False, listed("a", "c"), b"c", True) == [Send((b"b", b"c")), ListPage(False, b"c")]
    assert copying.chunks_done == 1, "a is equal; d may be on the next page there"
    assert copying.page(False, listed("d"), b"d", False) == [ListPage(True, b"d")]
    assert copying.page(True, [], b"", False) == []
    assert copying.sent((b"b", b"c")) == [AskDone()]
    assert not copying.over and copying.done() == [] and copying.over
    assert (copying.chunks_done, copying.chunks_sent) == (4, 2)


def test_no_page_is_asked_for_while_batches_wait_and_the_end_waits_for_every_batch() -> None:
    copying = started()
    assert copying.page(True, listed("a", "b", "c", "d", "e"), b"e", True) == [ListPage(False, b"")]
    assert copying.page(False, [], b"", False) == [Send((b"a", b"b")), Send((b"c", b"d"))], "two at once; the third waits, and so does the list"
    assert copying.sent((b"c", b"d")) == [Send((b"e",)), ListPage(True, b"e")]
    assert copying.page(True, [], b"", False) == []
    assert copying.sent((b"a", b"b")) == []
    assert copying.sent((b"e",)) == [AskDone()]


def test_batches_are_bounded_in_bytes_and_chunks_and_a_large_chunk_goes_alone() -> None:
    copying = started(at_once=9, batch_chunks=3)
    copying.page(True, [*listed("a", length=50), *listed("b", "c", "d"), *listed("e", "f", "g", "h", length=0)], b"h", False)
    sends = [effect.chunks for effect in copying.page(False, [], b"", False) if isinstance(effect, Send)]
    assert sends == [(b"a",), (b"b", b"c"), (b"d", b"e", b"f"), (b"g", b"h")]


def test_a_page_of_pending_chunks_alone_moves_on() -> None:
    copying = started()
    assert copying.page(True, [], b"m", True) == [ListPage(False, b"")]
    assert copying.page(False, [], b"", False) == [ListPage(True, b"m")]
    assert copying.page(True, [], b"", False) == [AskDone()]


def test_what_is_gone_here_is_removed_there() -> None:
    assert (sent_as(0), sent_as(3)) == (UpdateKind.REMOVE, UpdateKind.REPLACE)
