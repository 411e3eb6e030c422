"""Stop strings against the definition, said in the slowest way: look at the text one character at a time."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfs.inference.http.stops import StopStrings

LETTERS = st.text("ab", min_size=1, max_size=4)


def expected(text: str, stops: list[str]) -> tuple[str, bool]:
    for end in range(1, len(text) + 1):
        ended = [stop for stop in stops if text[:end].endswith(stop)]
        if ended:
            return text[: end - max(map(len, ended))], True
    return text, False


@given(chunks=st.lists(st.text("ab", max_size=4), max_size=12), stops=st.lists(LETTERS, max_size=3))
def test_the_cut_does_not_depend_on_the_pieces(chunks: list[str], stops: list[str]) -> None:
    made, out = StopStrings(stops), ""
    whole = "".join(chunks)
    for chunk in chunks:
        out += made.feed(chunk)
    out += made.finish()
    assert (out, made.found) == expected(whole, stops)


def test_text_is_held_back_only_while_it_may_become_a_stop_string() -> None:
    made = StopStrings(["END", "\n\n"])
    assert [made.feed(piece) for piece in ("say E", "N", "T\n", "x", "\n", "E", "ND", "more")] == ["say ", "", "ENT", "\nx", "", "\n", "", ""]
    assert made.found and made.finish() == ""


@pytest.mark.parametrize(("stops", "text", "out"), [(["b", "abc"], "abc", "a"), (["bc", "abc"], "xabc", "x"), ([], "abc", "abc")])
def test_the_one_complete_first_ends_it_and_of_two_the_longer(stops: list[str], text: str, out: str) -> None:
    made = StopStrings(stops)
    assert made.feed(text) + made.finish() == out
