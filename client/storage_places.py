"""Asking storage services on this machine where bytes lie, instead of for the bytes.

Owns one attempt: no replica but the first choice is asked, nothing is tried twice. Whoever gets no place asks for the bytes (storage_reads.py), where
failures are dealt with. Places are told as reads are answered: of what the chain had committed when the request was served, or later.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import trio

from kvfs.client.batch import Group, group_by_node
from kvfs.client.config import ClientConfig
from kvfs.client.peers import Peers, Where
from kvfs.client.place import Place
from kvfs.client.storage_reads import READ, choose
from kvfs.common.checksum import CHECKSUM_UNIT_BYTES
from kvfs.common.errors import ChunkNotFound, KvfsError
from kvfs.common.ids import ChunkId
from kvfs.common.wire import storage_pb2 as pb
from kvfs.common.wire.lending import BorrowedFiles

_UNIT = CHECKSUM_UNIT_BYTES
REQUEST_BYTES = 4 << 30
"""One request asks for the places of so much: its answer carries a mebibyte of checksums then."""


class ChunkRange(NamedTuple):
    """`length` bytes of a chunk from `offset`, which is a multiple of the checksum unit."""

    chain_id: int
    chunk_id: ChunkId
    offset: int
    length: int


class PlacePath:
    def __init__(self, peers: Peers, config: ClientConfig) -> None:
        self._peers = peers
        self._config = config

    async def places(self, ranges: Sequence[ChunkRange], limit_s: float) -> list[Place | None]:
        """One each, None where none was told in time. A service that hangs costs the places of its own chunks only."""
        peers = self._peers
        timeout_s = min(limit_s, self._config.read_attempt_s)
        found: list[Place | None] = [None] * len(ranges)
        if timeout_s <= 0:
            return found
        asked = []
        only: dict[int, tuple[int, Where] | None] = {}
        """Of chains that have one replica to ask: it, if it is on this machine."""
        for index, wanted in enumerate(ranges):
            chain_id = wanted.chain_id
            if chain_id in only:
                chosen = only[chain_id]
            else:
                chosen = self._choose(chain_id, wanted.chunk_id)
                if len(peers.routing.serving(chain_id)) <= 1:
                    only[chain_id] = chosen
            if chosen is not None:
                target, where = chosen
                asked.append((index, target, where.node_id, where.addresses, wanted.length))
        groups = group_by_node(asked, max_ios=self._config.batch_max_ios, max_bytes=REQUEST_BYTES)
        if len(groups) == 1:
            await self._ask(ranges, groups[0], found, timeout_s)
        elif groups:
            async with trio.open_nursery() as nursery:
                for group in groups:
                    nursery.start_soon(self._ask, ranges, group, found, timeout_s)
        return found

    def _choose(self, chain_id: int, chunk_id: ChunkId) -> tuple[int, Where] | None:
        """The replica to ask, if it is on this machine."""
        try:
            target = choose(self._peers, chain_id, chunk_id, ())
            where = self._peers.where(target)
        except KvfsError:
            return None
        return (target, where) if where.here else None

    async def _ask(self, ranges: Sequence[ChunkRange], group: Group, found: list[Place | None], timeout_s: float) -> None:
        peers = self._peers
        request = pb.ReadRequest(places=True)
        add = request.reads.add
        for index, target in zip(group.indexes, group.targets, strict=True):
            wanted = ranges[index]
            add(chain_id=wanted.chain_id, target_id=target, chunk_id=wanted.chunk_id, offset=wanted.offset, length=wanted.length)
        try:
            files = await peers.caller.borrowed(group.addresses, timeout_s=timeout_s)
            if files is None:
                return
            peers.counters.place_requests += 1
            reply = await peers.ask(group.addresses, READ, request, group.targets, timeout_s=timeout_s)
            # On another connection the files have other numbers.
            same = await peers.caller.borrowed(group.addresses, timeout_s=timeout_s) is files
        except KvfsError as error:
            peers.suspect(group.node_id, error)
            return
        if same and len(reply.results) == len(group.indexes):
            for index, result in zip(group.indexes, reply.results, strict=True):
                found[index] = _place(ranges[index], result, files)


def _place(wanted: ChunkRange, result: pb.ReadResult, files: BorrowedFiles) -> Place | None:
    """None: the service could not tell it, or contradicts itself."""
    _, _, offset, length = wanted
    status, chunk_length = result.status, result.chunk_length
    if status == ChunkNotFound.code:
        return Place(offset, 0, None, 0, 0, 0, b"")
    end = min(-(-(offset + length) // _UNIT) * _UNIT, chunk_length)
    if status or result.length != max(0, min(length, chunk_length - offset)):
        return None
    file, stored = result.file, result.stored
    if stored and files.get(file) is None:
        return None
    return Place(offset, end, files if stored else None, file, result.file_offset, stored, result.checksums)
