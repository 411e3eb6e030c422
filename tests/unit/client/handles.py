"""Handles over the fake services, and what a test of them checks at its end."""

from __future__ import annotations

from tests.unit.client.fakes import World

from kvfs.client.file.open_file import OpenFile


def opened(place: World, number: int, *, client: int = 0, write: bool = True, append: bool = False) -> OpenFile:
    chosen = place.clients[client]
    return chosen.open_file(place.meta.copy(number), session=chosen.new_session() if write else b"", read=True, write=write, append=append)


def nothing_is_held(place: World) -> None:
    memory = place.client.memory
    memory.reclaim()
    assert memory.pool.free_bytes == memory.pool.total_bytes
