"""How answers go out: OpenAI's two kinds of completion, whole or as a stream of events.

Owns the two shapes and `Completion`, the response. Invariants: nothing is sent before the answer has begun, so that a refusal still has its status;
in a stream every chunk has a choice, but for the one with the usage, which comes only when asked for (SGLang's client looks at choices[0] of each);
an error within a stream is its last event before [DONE]. The client's leaving cancels the answer.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from kvfs.inference.http.answers import Answers, Piece, Usage
from kvfs.inference.http.calls import Call
from kvfs.inference.http.incoming import Incoming
from kvfs.inference.http.refusals import refusal_of
from kvfs.inference.request import Request

log = logging.getLogger("kvfs.http")


@dataclass(frozen=True, slots=True)
class Head:
    """What every chunk of a call repeats."""

    identity: str
    model: str
    created_s: int

    def describe(self, kind: str, choices: list[dict[str, Any]], usage: Usage | None = None) -> dict[str, Any]:
        made: dict[str, Any] = {"id": self.identity, "object": kind, "created": self.created_s, "model": self.model, "choices": choices}
        return made | ({} if usage is None else {"usage": usage.describe()})


class Shape(Protocol):
    @property
    def whole_kind(self) -> str: ...

    @property
    def chunk_kind(self) -> str: ...

    def begin(self, choice: int) -> list[dict[str, Any]]:
        """Choices to send before the first text of one."""
        ...

    def chunk(self, choice: int, text: str, finish: str | None) -> dict[str, Any]: ...

    def whole(self, choice: int, text: str, finish: str | None) -> dict[str, Any]: ...


@dataclass(frozen=True, slots=True)
class TextShape:
    """/v1/completions."""

    echo: Sequence[str] = field(default=())
    """Texts to send before the answers, one for each choice."""
    whole_kind: str = "text_completion"
    chunk_kind: str = "text_completion"

    def begin(self, choice: int) -> list[dict[str, Any]]:
        return [self.chunk(choice, self.echo[choice], None)] if self.echo else []

    def chunk(self, choice: int, text: str, finish: str | None) -> dict[str, Any]:
        return {"index": choice, "text": text, "logprobs": None, "finish_reason": finish}

    def whole(self, choice: int, text: str, finish: str | None) -> dict[str, Any]:
        return self.chunk(choice, (self.echo[choice] if self.echo else "") + text, finish)


@dataclass(frozen=True, slots=True)
class ChatShape:
    """/v1/chat/completions."""

    whole_kind: str = "chat.completion"
    chunk_kind: str = "chat.completion.chunk"

    def begin(self, choice: int) -> list[dict[str, Any]]:
        return [self._delta(choice, {"role": "assistant", "content": ""}, None)]

    def chunk(self, choice: int, text: str, finish: str | None) -> dict[str, Any]:
        return self._delta(choice, {"content": text} if text else {}, finish)

    def whole(self, choice: int, text: str, finish: str | None) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": choice, "message": message, "logprobs": None, "finish_reason": finish}

    @staticmethod
    def _delta(choice: int, delta: dict[str, Any], finish: str | None) -> dict[str, Any]:
        return {"index": choice, "delta": delta, "logprobs": None, "finish_reason": finish}


class Completion(Response):  # type: ignore[misc]
    """The response of both endpoints; the answer is computed while it is sent."""

    def __init__(self, answers: Answers, requests: Sequence[Request], call: Call, shape: Shape, head: Head, incoming: Incoming) -> None:
        super().__init__()
        self._answers, self._requests, self._call = answers, requests, call
        self._shape, self._head, self._incoming = shape, head, incoming

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._incoming.while_here(partial(self._stream if self._call.stream else self._whole, scope, receive, send))

    async def _whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        texts, finishes = [""] * len(self._requests), [""] * len(self._requests)
        error: Exception | None = None
        async with self._answers.pieces(self._requests, self._call) as pieces:
            async for piece in pieces:
                if not isinstance(piece, Piece):
                    error = piece
                    break
                texts[piece.choice] += piece.text
                finishes[piece.choice] = piece.finish or ""
        if error is not None:
            raise error
        choices = [self._shape.whole(choice, text, finish) for choice, (text, finish) in enumerate(zip(texts, finishes, strict=True))]
        await JSONResponse(self._head.describe(self._shape.whole_kind, choices, self._answers.usage))(scope, receive, send)

    async def _stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        events = _EventStream(send)
        begun: set[int] = set()
        error: Exception | None = None
        try:
            async with self._answers.pieces(self._requests, self._call) as pieces:
                async for piece in pieces:
                    if not isinstance(piece, Piece):
                        error = piece
                        break
                    choices = self._chunks(piece, first=piece.choice not in begun)
                    begun.add(piece.choice)
                    await events.send([self._head.describe(self._shape.chunk_kind, [choice]) for choice in choices])
        except Exception as failure:
            error = failure
        if error is not None:
            if not events.begun:
                raise error
            log.warning("%s: the answer ended with an error", self._head.identity, exc_info=error)
            await events.send([refusal_of(error).describe()])
        elif self._call.include_usage:
            await events.send([self._head.describe(self._shape.chunk_kind, [], self._answers.usage)])
        await events.end()

    def _chunks(self, piece: Piece, *, first: bool) -> list[dict[str, Any]]:
        """Of one piece. An empty one at the beginning is sent too: it says that the answer has begun."""
        chunks = self._shape.begin(piece.choice) if first else []
        if piece.text or not (chunks or piece.finish):
            chunks.append(self._shape.chunk(piece.choice, piece.text, None))
        if piece.finish:
            chunks.append(self._shape.chunk(piece.choice, "", piece.finish))
        return chunks


class _EventStream:
    """Server-sent events; the response begins with the first."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.begun = False

    async def send(self, events: Sequence[dict[str, Any]]) -> None:
        if not self.begun:
            headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]
            await self._send({"type": "http.response.start", "status": 200, "headers": headers})
            self.begun = True
        body = "".join(f"data: {json.dumps(event, ensure_ascii=False, separators=(',', ':'))}\n\n" for event in events)
        await self._send({"type": "http.response.body", "body": body.encode(), "more_body": True})

    async def end(self) -> None:
        await self._send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})
