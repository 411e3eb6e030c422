"""`kvfs fsck`: metadata against chunks and replicas against each other, or one target by itself.

Whole cluster: the namespace's own consistency (Meta.Fsck), then every chunk of every serving replica: it belongs to a file that exists, lies on the
chain the layout says, within the file's length, and is the same on all serving replicas of its chain. A file that is open for writing may have chunks
behind its recorded length; inodes waiting for garbage collection may still have chunks. A difference counts only if it is still there at a second
look, since the cluster goes on working meanwhile. A KV-cache block must belong to a space that exists, lie on the chain that its digest says, and be
no longer than the space's blocks. What scrubs found damaged on all replicas is told with the name of the file or the space. Nothing is repaired here.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import trio
from rich.text import Text

from kvfs.cli.context import Options, common_options, console, print_json
from kvfs.cli.manager_calls import ManagerCalls, channel_pool, manager_addresses
from kvfs.cli.process import run_command
from kvfs.client.block_placement import BlockPlacement
from kvfs.common.errors import InvalidArgument, UnknownTarget
from kvfs.common.ids import chunk_id as chunk_id_of
from kvfs.common.ids import chunk_index, chunk_inode, is_space
from kvfs.common.routing import Routing
from kvfs.common.wire import cluster_pb2, meta_pb2, storage_pb2
from kvfs.common.wire.channel import ChannelPool
from kvfs.common.wire.service import method
from kvfs.storage.engine.offline import check_directory

CALL_TIMEOUT_S = 30.0
CHECK_TIMEOUT_S = 3600.0
PAGE = 4096
SECOND_LOOK_S = 1.0
PROBLEMS_MAX = 1000


@dataclass(slots=True)
class Report:
    inodes: int = 0
    chunks: int = 0
    bytes: int = 0
    replicas: int = 0
    problems: list[str] = field(default_factory=list)


@dataclass(slots=True)
class FileFacts:
    length: int
    chunk_size: int
    chains: tuple[int, ...]
    writers: int


@dataclass(slots=True)
class SpaceFacts:
    block_bytes: int
    placement: BlockPlacement
    chains: tuple[int, ...]


class Checker:
    """One pass over a cluster."""

    def __init__(self, pool: ChannelPool, routing: Routing) -> None:
        self.pool, self.routing = pool, routing
        self.report = Report()
        self.files: dict[int, FileFacts] = {}
        self.spaces: dict[int, SpaceFacts] = {}
        self.pending_gc: set[int] = set()
        self.lost: list[tuple[int, int, int]] = []
        """(inode, chunk, chain)"""
        self.meta = [address for node in routing.nodes_with_role(cluster_pb2.ROLE_META) if node.alive for address in node.addresses]

    async def run(self) -> Report:
        await self.read_metadata()
        for chain in self.routing.chains:
            await self.check_chain(chain.chain_id)
        for chain in self.routing.chains:
            for target_id in self.routing.serving(chain.chain_id):
                await self.read_damage(target_id)
        await self.name_lost()
        return self.report

    async def read_damage(self, target_id: int) -> None:
        """What a scrub found and could not mend, by name."""
        request = storage_pb2.DamageRequest(target_id=target_id)
        reply = await self.pool.call(self.routing.addresses_of_target(target_id), method("Storage", "Damage"), request, timeout_s=CALL_TIMEOUT_S)
        paths = await self.paths({chunk_inode(damage.chunk_id) for damage in reply.damages if damage.chunk_id})
        for damage in reply.damages:
            whose = ""
            if damage.chunk_id:
                path = paths.get(chunk_inode(damage.chunk_id))
                whose = f"{named(damage.chunk_id)} ({path or 'it has no name any more'}): "
            self.add(f"target {target_id}: {whose}{damage.problem}")

    async def paths(self, inodes: set[int]) -> dict[int, str]:
        if not inodes:
            return {}
        reply = await self.pool.call(self.meta, method("Meta", "Fsck"), meta_pb2.FsckRequest(names_of=inodes), timeout_s=CALL_TIMEOUT_S)
        return {found.inode: os.fsdecode(found.path) for found in reply.paths}

    async def read_metadata(self) -> None:
        cursor = b""
        while True:
            request = meta_pb2.FsckRequest(cursor=cursor, limit=PAGE)
            page = await self.pool.call(self.meta, method("Meta", "Fsck"), request, timeout_s=CALL_TIMEOUT_S)
            self.report.problems += page.problems
            self.pending_gc.update(page.pending_gc)
            for inode in page.inodes:
                self.report.inodes += 1
                if inode.type == meta_pb2.FILE:
                    self.files[inode.inode] = FileFacts(inode.length, inode.layout.chunk_size, tuple(inode.layout.chain_ids), inode.writers)
                elif inode.HasField("space"):
                    self.spaces[inode.inode] = SpaceFacts(
                        inode.space.block_bytes, BlockPlacement(inode.space.chain_ids), tuple(inode.space.chain_ids)
                    )
            cursor = page.cursor
            if not page.more:
                return

    async def list_chunks(self, target_id: int) -> AsyncIterator[storage_pb2.ChunkInfo]:
        after = b""
        addresses = self.routing.addresses_of_target(target_id)
        while True:
            request = storage_pb2.ListChunksRequest(target_id=target_id, after=after, limit=PAGE)
            page = await self.pool.call(addresses, method("Storage", "ListChunks"), request, timeout_s=CALL_TIMEOUT_S)
            for chunk in page.chunks:
                yield chunk
            if not page.more or not page.chunks:
                return
            after = page.chunks[-1].chunk_id

    async def check_chain(self, chain_id: int) -> None:
        """Each replica's chunks against the files, then the replicas against each other."""
        replicas: dict[int, dict[bytes, tuple[int, int, int]]] = {}
        for target_id in self.routing.serving(chain_id):
            found: dict[bytes, tuple[int, int, int]] = {}
            async for chunk in self.list_chunks(target_id):
                if chunk.version == 0:
                    continue  # written, never committed: no reader sees it
                found[chunk.chunk_id] = (chunk.version, chunk.length, chunk.checksum)
                self.report.bytes += chunk.length
                if problem := self.chunk_problem(chain_id, chunk):
                    self.add(f"target {target_id}: {problem}")
            self.report.chunks += len(found)
            self.report.replicas += 1
            replicas[target_id] = found
        if replicas:
            self.find_lost(chain_id, set().union(*replicas.values()))
        for chunk_id in {chunk_id for found in replicas.values() for chunk_id in found}:
            views = {target: found.get(chunk_id) for target, found in replicas.items()}
            if len(set(views.values())) > 1:
                self.add(f"chain {chain_id}: {named(chunk_id)} differs between replicas (version, length, checksum): {views}")

    def find_lost(self, chain_id: int, found: set[bytes]) -> None:
        """Chunks that are not there since the chain's data was given up."""
        below = self.routing.chain(chain_id).lost_below
        for inode, file in self.files.items() if below else ():
            if inode < below and chain_id in file.chains:
                for index in range(-(-file.length // file.chunk_size)):
                    if file.chains[index % len(file.chains)] == chain_id and chunk_id_of(inode, index) not in found:
                        self.lost.append((inode, index, chain_id))

    async def name_lost(self) -> None:
        paths = await self.paths({inode for inode, _, _ in self.lost[:PROBLEMS_MAX]})
        for inode, index, chain_id in self.lost:
            name = named(chunk_id_of(inode, index))
            self.add(f"{name} ({paths.get(inode) or 'it has no name any more'}) is lost, unless it was never written: chain {chain_id} was given up")

    def chunk_problem(self, chain_id: int, chunk: storage_pb2.ChunkInfo) -> str | None:
        inode, index = chunk_inode(chunk.chunk_id), chunk_index(chunk.chunk_id)
        name = named(chunk.chunk_id)
        if inode in self.pending_gc:
            return None
        if is_space(inode):
            return self.block_problem(chain_id, chunk)
        file = self.files.get(inode)
        if file is None:
            return f"{name} is an orphan: no such file"
        if file.chains[index % len(file.chains)] != chain_id:
            return f"{name} lies on chain {chain_id}, its layout says {file.chains[index % len(file.chains)]}"
        if chunk.length > file.chunk_size:
            return f"{name} has {chunk.length} bytes, chunks of the file have at most {file.chunk_size}"
        if not file.writers and index * file.chunk_size + chunk.length > file.length:
            return f"{name} ends at {index * file.chunk_size + chunk.length}, behind the file's length {file.length}"
        return None

    def block_problem(self, chain_id: int, chunk: storage_pb2.ChunkInfo) -> str | None:
        name = named(chunk.chunk_id)
        space = self.spaces.get(chunk_inode(chunk.chunk_id))
        if space is None:
            return f"{name} is an orphan: no such space"
        if (due := space.placement.chain(chunk.chunk_id[8:])) != chain_id:
            return f"{name} lies on chain {chain_id}, its digest says {due}"
        if chunk.length > space.block_bytes:
            return f"{name} has {chunk.length} bytes, blocks of the space have at most {space.block_bytes}"
        return None

    def add(self, problem: str) -> None:
        if len(self.report.problems) < PROBLEMS_MAX:
            self.report.problems.append(problem)


def named(chunk_id: bytes) -> str:
    inode = chunk_inode(chunk_id)
    return f"block {chunk_id[8:].hex()} of space {inode}" if is_space(inode) else f"chunk {chunk_index(chunk_id)} of inode {inode}"


async def check_cluster(spec: str, *, read_data: bool = False) -> Report:
    """`read_data`: every serving replica also reads its bytes against their checksums. Raises what a call raises when a service cannot be asked."""
    managers, cluster_id = manager_addresses(spec)
    async with channel_pool(cluster_id) as pool:
        manager = ManagerCalls(pool, managers)
        routing = Routing((await manager.call("GetRouting", cluster_pb2.GetRoutingRequest())).routing)
        report = await Checker(pool, routing).run()
        if report.problems:
            await trio.sleep(SECOND_LOOK_S)
            again = await Checker(pool, Routing((await manager.call("GetRouting", cluster_pb2.GetRoutingRequest())).routing)).run()
            again.problems = [problem for problem in again.problems if problem in set(report.problems)]
            report = again
        if read_data:
            for chain in routing.chains:
                for target_id in routing.serving(chain.chain_id):
                    report.problems += (await ask_target(pool, routing, target_id, read_data=True)).problems
        return report


async def check_target(spec: str, target_id: int, *, read_data: bool) -> Report:
    """Ask the storage service that has the target to check it."""
    managers, cluster_id = manager_addresses(spec)
    async with channel_pool(cluster_id) as pool:
        routing = Routing((await ManagerCalls(pool, managers).call("GetRouting", cluster_pb2.GetRoutingRequest())).routing)
        if target_id not in {target.target_id for target in routing.targets}:
            raise UnknownTarget(f"there is no target {target_id}: `kvfs admin list-targets` shows them")
        return await ask_target(pool, routing, target_id, read_data=read_data)


async def ask_target(pool: ChannelPool, routing: Routing, target_id: int, *, read_data: bool) -> Report:
    request = storage_pb2.CheckTargetRequest(target_id=target_id, read_data=read_data)
    reply = await pool.call(routing.addresses_of_target(target_id), method("Storage", "CheckTarget"), request, timeout_s=CHECK_TIMEOUT_S)
    return Report(chunks=reply.chunks, bytes=reply.bytes, replicas=1, problems=[f"target {target_id}: {problem}" for problem in reply.problems])


def as_dict(report: Report) -> dict[str, Any]:
    return {
        "clean": not report.problems,
        "inodes": report.inodes,
        "chunks": report.chunks,
        "bytes": report.bytes,
        "replicas": report.replicas,
        "problems": report.problems,
    }


@click.command()
@click.option("--target", default=None, metavar="ID|DIR", help="Check one target: its id, or its directory while no service runs.")
@click.option("--read-data", is_flag=True, help="Also read every byte against its checksum.")
@common_options
def fsck(options: Options, target: str | None, read_data: bool) -> None:
    """Check metadata against chunks, and replicas against each other. Exit status 1 when something is wrong."""
    if target is None:

        async def ask_all() -> Report:
            return await check_cluster(options.cluster_spec(), read_data=read_data)

        report = run_command(ask_all)
    elif target.isdigit():

        async def ask() -> Report:
            return await check_target(options.cluster_spec(), int(target), read_data=read_data)

        report = run_command(ask)
    elif Path(target).is_dir():
        chunks, count, problems = check_directory(Path(target).resolve(), read_data=read_data)
        report = Report(chunks=chunks, bytes=count, replicas=1, problems=problems)
    else:
        raise InvalidArgument(f"{target} is neither a target's number nor a directory: `kvfs admin list-targets` shows the numbers")
    if options.as_json:
        print_json(as_dict(report))
    else:
        for problem in report.problems:
            console.print(problem, style="red")
        verdict = Text("clean", style="green") if not report.problems else Text(f"{len(report.problems)} problems", style="red")
        facts = f"{report.inodes} inodes, {report.chunks} chunks on {report.replicas} replicas, {report.bytes} bytes: "
        console.print(Text(facts) + verdict)
    if report.problems:
        raise click.exceptions.Exit(1)
