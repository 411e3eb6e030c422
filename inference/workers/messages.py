"""Requests and events as messages (common/wire/inference.proto) and back.

Pure functions. What came over the wire is checked by the nouns of request.py: a message that makes no sense is InvalidArgument.
"""

from __future__ import annotations

from kvfs.common.errors import InvalidArgument
from kvfs.common.wire import inference_pb2 as pb
from kvfs.inference.request import Finish, Request, Sampling, TokenEvent

_REASONS = {None: pb.RUNNING, Finish.STOP: pb.STOP, Finish.LENGTH: pb.LENGTH, Finish.CANCELLED: pb.CANCELLED, Finish.ERROR: pb.ERROR}
_FINISHES = {reason: finish for finish, reason in _REASONS.items()}


def request_to_wire(request: Request) -> pb.InferenceRequest:
    sampling = request.sampling
    return pb.InferenceRequest(
        id=request.id,
        prompt=request.prompt,
        sampling=pb.InferenceSampling(
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            seed=sampling.seed,
            repetition_penalty=sampling.repetition_penalty,
            ignore_eos=sampling.ignore_eos,
            stop_tokens=sampling.stop_tokens,
        ),
        answered=request.answered,
        salt=request.salt,
        hand_over=request.hand_over,
    )


def request_from_wire(message: pb.InferenceRequest, id: str) -> Request:
    """`id`: what this side calls it."""
    sampling = message.sampling
    return Request(
        id=id,
        prompt=tuple(message.prompt),
        sampling=Sampling(
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            seed=sampling.seed,
            repetition_penalty=sampling.repetition_penalty,
            ignore_eos=sampling.ignore_eos,
            stop_tokens=tuple(sampling.stop_tokens),
        ),
        answered=tuple(message.answered),
        salt=message.salt,
        hand_over=message.hand_over,
    )


def event_to_wire(event: TokenEvent, request: str, over: bool) -> pb.InferenceEvent:
    return pb.InferenceEvent(
        request=request,
        index=event.index,
        token=0 if event.token is None else event.token + 1,
        finish=_REASONS[event.finish],
        cached_tokens=event.cached_tokens,
        disk_tokens=event.disk_tokens,
        message=event.message,
        over=over,
    )


def event_from_wire(message: pb.InferenceEvent) -> TokenEvent:
    if message.finish not in _FINISHES:
        raise InvalidArgument(f"a reason to finish numbered {message.finish}: is the worker newer than this router?")
    return TokenEvent(
        request=message.request,
        index=message.index,
        token=message.token - 1 if message.token else None,
        finish=_FINISHES[message.finish],
        cached_tokens=message.cached_tokens,
        disk_tokens=message.disk_tokens,
        message=message.message,
    )
