"""Checking the metadata: every entry names an inode, every inode has as many names as it says, everything is reachable.

`check_all` reads the whole store in pages, then looks again, in one transaction each, at what seemed wrong: the store lives on meanwhile.
`Fsck.page` serves the RPC: the first page checks and carries the problems, every page lists inodes; or it tells inodes' paths, for whoever knows
what is wrong with their chunks. This module must never write.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import trio

from kvfs.common.ids import ROOT_INODE, is_space
from kvfs.common.wire import meta_pb2 as pb
from kvfs.meta.kv.engine import Engine
from kvfs.meta.kv.transaction import Transaction
from kvfs.meta.namespace import keys, records

PAGE = 1000
PAGE_MAX = 4096
PROBLEMS_MAX = 10_000
LOOKS = 3
"""How often a suspicion is checked anew before it counts: what changes meanwhile looks wrong once, not every time."""


@dataclass(slots=True)
class _Survey:
    """What one pass over the store has seen."""

    names: Counter[int] = field(default_factory=Counter)
    subdirectories: Counter[int] = field(default_factory=Counter)
    kinds: dict[int, int] = field(default_factory=dict)
    links: dict[int, int] = field(default_factory=dict)
    parents: dict[int, int] = field(default_factory=dict)
    entries: list[tuple[int, bytes, int, int]] = field(default_factory=list)
    sessions: set[int] = field(default_factory=set)
    garbage: set[int] = field(default_factory=set)
    beside: list[tuple[bytes, int]] = field(default_factory=list)


async def _rows(engine: Engine, kind: bytes) -> list[tuple[bytes, bytes]]:
    begin, end = keys.span(kind)
    found: list[tuple[bytes, bytes]] = []
    more = True
    while more:
        with Transaction(engine) as txn:
            rows, more = txn.snapshot_get_range(begin, end, limit=PAGE)
        found.extend(rows)
        if rows:
            begin = rows[-1][0] + b"\0"
        await trio.lowlevel.checkpoint()
    return found


async def _survey(engine: Engine) -> _Survey:
    seen = _Survey()
    for key, value in await _rows(engine, keys.INODE):
        inode = records.decode_inode(value)
        number = keys.owner(key)
        seen.kinds[number] = inode.type
        seen.links[number] = inode.nlink
        if inode.type == pb.DIRECTORY:
            seen.parents[number] = inode.parent
    for key, value in await _rows(engine, keys.ENTRY):
        entry = records.decode_entry(value)
        parent = keys.owner(key)
        seen.entries.append((parent, keys.tail(key), entry.inode, entry.type))
        seen.names[entry.inode] += 1
        if entry.type == pb.DIRECTORY:
            seen.subdirectories[parent] += 1
    for key, value in await _rows(engine, keys.DIRECTORY_LINKS):
        number = keys.owner(key)
        if seen.links.get(number):
            seen.links[number] = records.decode_links(value)
        seen.beside.append((b"link count", number))
    seen.beside.extend((b"directory times", keys.owner(key)) for key, _ in await _rows(engine, keys.DIRECTORY_TIMES))
    seen.beside.extend((b"extended attribute", keys.owner(key)) for key, _ in await _rows(engine, keys.XATTR))
    seen.beside.extend((b"truncation", keys.owner(key)) for key, _ in await _rows(engine, keys.CUT))
    for key, _ in await _rows(engine, keys.SESSION):
        seen.sessions.add(keys.owner(key))
    for key, _ in await _rows(engine, keys.GARBAGE):
        seen.garbage.add(keys.garbage_parts(key)[1])
    return seen


def _problems(seen: _Survey) -> set[str]:
    found: set[str] = set()
    detached = {number for number, kind in seen.kinds.items() if kind == pb.DIRECTORY and seen.links[number] == 0}
    for parent, name, number, kind in seen.entries:
        where = f"entry {name!r} of directory {parent}"
        if number not in seen.kinds:
            found.add(f"{where} names inode {number}, which is not there")
        elif seen.kinds[number] != kind:
            found.add(f"{where} says type {kind}, inode {number} is of type {seen.kinds[number]}")
        elif kind == pb.DIRECTORY and seen.parents[number] != parent and seen.links[number]:
            found.add(f"{where}: directory {number} says that its parent is {seen.parents[number]}")
        if parent not in seen.kinds:
            found.add(f"{where}: that directory is not there")
        elif seen.kinds[parent] != pb.DIRECTORY:
            found.add(f"{where}: that inode is not a directory")
        elif is_space(parent):
            found.add(f"{where}: a KV-cache space has no entries")
    for number, kind in seen.kinds.items():
        names = seen.names[number]
        links = seen.links[number]
        if kind == pb.DIRECTORY:
            if number == ROOT_INODE:
                names += 1
            if links == 0:
                if number not in seen.garbage:
                    found.add(f"directory {number} was removed and nothing will take it apart")
                continue
            if names != 1:
                found.add(f"directory {number} has {names} names")
            if links != 2 + seen.subdirectories[number]:
                found.add(f"directory {number} says {links} links, and has {seen.subdirectories[number]} subdirectories")
            if not _reaches_root(seen, number, detached):
                found.add(f"directory {number} cannot be reached from the root")
        else:
            if names != links:
                found.add(f"inode {number} says {links} links, and has {names} names")
            if links == 0 and number not in seen.sessions and number not in seen.garbage:
                found.add(f"inode {number} has no name, no session, and nothing will free it")
    for what, number in seen.beside:
        if number not in seen.kinds:
            found.add(f"a {what.decode()} record of inode {number}, which is not there")
    return found


def _reaches_root(seen: _Survey, number: int, detached: set[int]) -> bool:
    """Or ends in a tree that is being removed."""
    for _ in range(len(seen.parents) + 1):
        if number == ROOT_INODE or number in detached:
            return True
        if number not in seen.parents:
            return False
        number = seen.parents[number]
    return False


async def check_all(engine: Engine) -> list[str]:
    """All that is wrong, as sentences. Holds the whole tree's numbers in memory while it runs."""
    suspected: set[str] | None = None
    for _ in range(LOOKS):
        found = _problems(await _survey(engine))
        suspected = found if suspected is None else suspected & found
        if not suspected:
            break
    return sorted(suspected or ())[:PROBLEMS_MAX]


async def paths(engine: Engine, wanted: set[int]) -> dict[int, bytes]:
    """A path of each inode, as far as it has one. Reads all entries once, and holds the directories' in memory."""
    above: dict[int, tuple[int, bytes]] = {}
    for key, value in await _rows(engine, keys.ENTRY):
        entry = records.decode_entry(value)
        if entry.type == pb.DIRECTORY or entry.inode in wanted:
            above[entry.inode] = keys.owner(key), keys.tail(key)
    found: dict[int, bytes] = {}
    for number in wanted:
        parts: list[bytes] = []
        at = number
        while at in above and len(parts) <= len(above):
            at, name = above[at]
            parts.append(name)
        if at == ROOT_INODE:
            found[number] = b"/" + b"/".join(reversed(parts))
    return found


def _writers(txn: Transaction, number: int) -> int:
    """Who may have written behind the recorded length."""
    sessions, _ = txn.snapshot_get_range(*keys.sessions(number))
    return sum(1 for _, value in sessions if records.decode_session(value).write)


class Fsck:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def page(self, request: pb.FsckRequest) -> pb.FsckReply:
        """Inodes behind the cursor. The first page (no cursor) carries the problems and what waits to be freed."""
        reply = pb.FsckReply()
        if request.names_of:
            for inode, path in sorted((await paths(self._engine, set(request.names_of))).items()):
                reply.paths.add(inode=inode, path=path)
            return reply
        if not request.cursor:
            reply.problems.extend(await check_all(self._engine))
            reply.pending_gc.extend(keys.garbage_parts(key)[1] for key, _ in await _rows(self._engine, keys.GARBAGE))
        begin, end = keys.span(keys.INODE)
        if request.cursor:
            begin = keys.INODE + request.cursor[:8] + b"\0"
        with Transaction(self._engine) as txn:
            rows, reply.more = txn.snapshot_get_range(begin, end, limit=min(request.limit or PAGE, PAGE_MAX))
            for _, value in rows:
                listed = reply.inodes.add()
                listed.CopyFrom(records.decode_inode(value))
                if listed.type == pb.FILE:
                    listed.writers = _writers(txn, listed.inode)
        if rows:
            reply.cursor = rows[-1][0][4:]
        return reply
