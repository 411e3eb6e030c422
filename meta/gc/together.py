"""Several calls at once that fail as one call does: with the first error itself, not with a group."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

import trio

from kvfs.common.errors import KvfsError


async def together(calls: Sequence[Callable[[], Awaitable[None]]]) -> None:
    """Run all to their end; then raise the first KvfsError, if there was one."""
    errors: list[KvfsError] = []

    async def one(call: Callable[[], Awaitable[None]]) -> None:
        try:
            await call()
        except KvfsError as error:
            errors.append(error)

    if len(calls) == 1:
        await calls[0]()
        return
    async with trio.open_nursery() as nursery:
        for call in calls:
            nursery.start_soon(one, call)
    if errors:
        raise errors[0]
