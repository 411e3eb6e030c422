"""Which worker a request goes to."""

from __future__ import annotations

from kvfs.inference.workers.placement import Candidate, Prefixes, Sent, choose_decode, choose_prefill, prefill_cost


def chosen(*candidates: Candidate, prompt: int = 10_000, anywhere: int = 0) -> str:
    found = choose_prefill(candidates, prompt, anywhere)
    assert found is not None
    return found.name


def test_the_longest_prefix_in_memory_wins_among_equals() -> None:
    assert chosen(Candidate(name="a"), Candidate(name="b", here=6400), Candidate(name="c", here=64)) == "b"


def test_a_long_queue_outweighs_a_prefix() -> None:
    """6,400 cached tokens save about 7,800 tokens' cost here."""
    assert chosen(Candidate(name="a"), Candidate(name="b", here=6400, waiting_tokens=5_000)) == "b"
    assert chosen(Candidate(name="a"), Candidate(name="b", here=6400, waiting_tokens=10_000)) == "a"


def test_what_others_computed_is_read_and_counts_little() -> None:
    """With everything in the store, a queue of 1,500 tokens is worth more than having it in memory."""
    busy, idle = Candidate(name="busy", here=9_984, waiting_tokens=1_500), Candidate(name="idle")
    assert chosen(busy, idle, anywhere=9_984) == "idle"
    assert chosen(busy, idle, anywhere=0) == "busy"


def test_equal_ones_are_taken_by_their_requests_and_names() -> None:
    assert chosen(Candidate(name="b"), Candidate(name="a")) == "a"
    assert chosen(Candidate(name="b"), Candidate(name="a", requests=1)) == "b"
    assert choose_prefill([], 10, 0) is None


def test_attention_makes_a_late_token_dearer() -> None:
    """DeepSeek-V3: as dear as the linear layers at a mean of 14,600 keys (inference.md 2.8)."""
    assert prefill_cost(100, 14_550) == 200
    assert round(prefill_cost(29_200, 0)) == 58_400


def test_answers_go_where_the_fewest_pages_are_used_then_the_fewest_requests() -> None:
    found = choose_decode([Candidate(name="a", pages=100, pages_used=50), Candidate(name="b", pages=1000, pages_used=400, requests=9)])
    assert found is not None and found.name == "b"
    found = choose_decode([Candidate(name="a", pages=100, requests=2), Candidate(name="b", pages=100, requests=1)])
    assert found is not None and found.name == "b"
    assert choose_decode([]) is None


def test_prefixes_forget_tails_first() -> None:
    prefixes = Prefixes()
    keys = [bytes([number]) * 16 for number in range(6)]
    prefixes.note(keys[:4], 4)
    assert (prefixes.tokens(keys), prefixes.tokens(keys[1:])) == (256, 192)
    prefixes.note([keys[5]], 4)
    assert prefixes.tokens(keys) == 192
    assert prefixes.tokens([keys[5]]) == 64
    prefixes.clear()
    assert prefixes.tokens(keys) == 0


def test_what_was_sent_counts_until_the_worker_tells_of_it() -> None:
    sent = Sent()
    sent.add("a", 300, 5)
    sent.add("b", 200, 4)
    sent.taken("a", 10.0)
    sent.told(9.9)
    assert (sent.tokens, sent.pages) == (500, 9), "the status may have been made before the worker had it"
    sent.told(10.1)
    assert (sent.tokens, sent.pages) == (200, 4), "b is still under way to the worker"
    sent.taken("b", 10.2)
    sent.begun("b")
    assert (sent.tokens, sent.pages) == (0, 4)
    sent.forget("b")
    sent.begun("b")
    assert (sent.tokens, sent.pages) == (0, 0)
