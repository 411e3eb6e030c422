"""Tokens on their way to a router: nothing lost, nothing doubled, nothing kept for ever; and requests as messages."""

from __future__ import annotations

import random

import pytest

from kvfs.common.errors import InvalidArgument, Overloaded
from kvfs.common.wire import inference_pb2 as pb
from kvfs.inference.request import Finish, Request, Sampling, TokenEvent
from kvfs.inference.workers import sessions
from kvfs.inference.workers.messages import event_from_wire, event_to_wire, request_from_wire, request_to_wire
from kvfs.inference.workers.sessions import DONE_MAX, SILENT_S, Session, Sessions


def event(index: int, finish: Finish | None = None) -> TokenEvent:
    return TokenEvent(request="s:r", index=index, token=index, finish=finish)


def test_events_stay_until_the_router_has_them_whatever_answers_are_lost() -> None:
    chance = random.Random(1)
    session = Session(0.0)
    session.begin("r")
    told, got, after = 0, list[int](), 0
    while len(got) < 500:
        for _ in range(chance.randrange(4)):
            if told < 500:
                session.add(event(told), "r", False)
                told += 1
        session.arrived(after)
        first, events = session.take(7)
        if chance.random() < 0.5:
            continue  # this answer is lost
        for number, message in enumerate(events, first):
            if number > after:
                after = number
                got.append(message.index)
    assert got == list(range(500))
    session.arrived(after)
    assert session.waiting == 0


def test_a_request_is_begun_once() -> None:
    session = Session(0.0)
    assert session.begin("r") and not session.begin("r")
    session.add(event(0, Finish.STOP), "r", True)
    assert not session.begin("r") and not session.requests
    session.begin("x")
    session.never_began("x")
    assert session.begin("x")
    for number in range(DONE_MAX):
        session.begin(f"n{number}")
        session.add(event(0, Finish.STOP), f"n{number}", True)
    assert session.begin("r"), "the oldest ones are forgotten"


def test_silent_and_overflowing_sessions_are_forsaken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "EVENTS_MAX", 10)
    known = Sessions()
    quiet, slow, fine = (known.of(bytes([number]) * 16, 100.0, begin=True) for number in range(3))
    assert slow is not None
    known.of(bytes([1]) * 16, 100 + SILENT_S)
    known.of(bytes([2]) * 16, 100 + SILENT_S)
    for number in range(11):
        slow.add(event(number), "r", False)
    assert [session for _, session in known.forsaken(101 + SILENT_S)] == [quiet, slow]
    assert known.known(bytes([2]) * 16) is fine and known.known(bytes(16)) is None
    monkeypatch.setattr(sessions, "SESSIONS_MAX", 1)
    with pytest.raises(Overloaded):
        known.of(b"n" * 16, 0.0, begin=True)
    assert known.of(b"n" * 16, 0.0) is None, "a session begins only when that is asked for: its numbers begin with it"


def test_requests_and_events_survive_the_wire() -> None:
    sampling = Sampling(
        max_tokens=9, temperature=0.7, top_p=0.9, top_k=40, seed=1 << 62, repetition_penalty=1.1, ignore_eos=True, stop_tokens=(1, 129_279)
    )
    request = Request(id="r", prompt=(0, 5, 129_279), sampling=sampling, answered=(7, 0), salt=b"\0x", hand_over=True)
    assert request_from_wire(pb.InferenceRequest.FromString(request_to_wire(request).SerializeToString()), "r") == request
    for finish in (None, *Finish):
        for token in (None, 0, 5):
            one = TokenEvent(request="r", index=3, token=token, finish=finish, cached_tokens=64, disk_tokens=64, message="why")
            assert event_from_wire(event_to_wire(one, "r", finish is not None)) == one
    with pytest.raises(InvalidArgument):
        event_from_wire(pb.InferenceEvent(finish=99))  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument):
        request_from_wire(pb.InferenceRequest(id="r"), "r")
