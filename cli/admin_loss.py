"""`kvfs admin accept-loss`: let a chain go on without the data that nobody has any more, after saying whose it was."""

from __future__ import annotations

from typing import Any

import click
import trio

from kvfs.cli.context import Options, common_options, console, human_bytes, print_json
from kvfs.cli.fsck import Checker
from kvfs.cli.manager_calls import ManagerCalls, channel_pool, manager_addresses, target_statuses
from kvfs.cli.missing import missing_chains
from kvfs.common.errors import DeadlineExceeded, InvalidArgument, SetupError, UnknownChain
from kvfs.common.routing import Routing
from kvfs.common.wire import cluster_pb2
from kvfs.common.wire.channel import ChannelPool

NAMES_SHOWN = 20
NAMES_A_CALL = 1000
SERVES_S = 30.0
POLL_S = 0.1


@click.command("accept-loss")
@click.argument("what", metavar="CHAIN|TARGET", type=int)
@click.option("--yes", is_flag=True, help="Do not ask.")
@common_options
def accept_loss(options: Options, what: int, yes: bool) -> None:
    """Give up the data of a chain that no target can serve any more; the chain goes on empty.

    It says first which files and spaces lie on the chain. Afterwards what they had there reads as an I/O error, never as zeros, until they are
    removed; KV-cache blocks are misses. `kvfs fsck` goes on naming the files.
    """

    async def look() -> tuple[cluster_pb2.Chain, dict[str, Any]]:
        managers, cluster_id = manager_addresses(options.cluster_spec())
        async with channel_pool(cluster_id) as pool:
            return await _look(pool, ManagerCalls(pool, managers), what)

    async def accept(chain: cluster_pb2.Chain, below: int) -> None:
        managers, cluster_id = manager_addresses(options.cluster_spec())
        async with channel_pool(cluster_id) as pool:
            await _accept(ManagerCalls(pool, managers), chain, below)

    chain, report = trio.run(look)
    if not options.as_json:
        _print(report)
    if not yes:
        if options.as_json:
            raise SetupError("with --json it cannot ask: look first without, then say --yes")
        click.confirm(f"Give up this data of chain {chain.chain_id} for ever?", abort=True)
    trio.run(accept, chain, report["lost_below"])
    if options.as_json:
        print_json(report)
    else:
        console.print(f"chain {chain.chain_id} serves again, empty")


async def _look(pool: ChannelPool, manager: ManagerCalls, what: int) -> tuple[cluster_pb2.Chain, dict[str, Any]]:
    routing = Routing((await manager.call("GetRouting", cluster_pb2.GetRoutingRequest())).routing)
    chain_id = what
    if what in {target.target_id for target in routing.targets}:
        chain_id = routing.target(what).chain_id
    if chain_id not in {chain.chain_id for chain in routing.chains}:
        raise UnknownChain(f"{what} is neither a chain nor a target of one: `kvfs admin list-chains` shows them")
    chain = routing.chain(chain_id)
    if routing.serving(chain_id):
        raise InvalidArgument(f"chain {chain_id} is served by target {routing.serving(chain_id)[0]}: nothing is lost")
    missing = missing_chains(routing.message, await target_statuses(pool, routing.message))
    reason = next(each.reason for each in missing if each.chain_id == chain_id)
    checker = Checker(pool, routing)
    await checker.read_metadata()
    files: list[dict[str, Any]] = []
    for inode, facts in sorted(checker.files.items()):
        count = -(-facts.length // facts.chunk_size)
        on_chain = [index for index in range(min(count, len(facts.chains))) if facts.chains[index] == chain_id]
        chunks = sum(-(-(count - first) // len(facts.chains)) for first in on_chain)
        if chunks:
            files.append({"inode": inode, "path": "", "chunks": chunks, "bytes_at_most": min(facts.length, chunks * facts.chunk_size)})
    spaces: list[dict[str, Any]] = [{"inode": inode, "path": ""} for inode, facts in sorted(checker.spaces.items()) if chain_id in facts.chains]
    for rows in (files, spaces):
        for first in range(0, len(rows), NAMES_A_CALL):
            part = rows[first : first + NAMES_A_CALL]
            paths = await checker.paths({row["inode"] for row in part})
            for row in part:
                row["path"] = paths.get(row["inode"], "")
    report = {"chain": chain_id, "version": chain.version, "reason": reason, "files": files, "spaces": spaces}
    return chain, report | {"lost_below": max(checker.files, default=0) + 1}


def _print(report: dict[str, Any]) -> None:
    console.print(report["reason"], style="red")
    files, spaces = report["files"], report["spaces"]
    size = human_bytes(sum(row["bytes_at_most"] for row in files))
    console.print(f"{len(files)} files have chunks there, {size} at most; {len(spaces)} KV-cache spaces have blocks there")
    for row in (*files, *spaces)[:NAMES_SHOWN]:
        console.print(f"  {row['path'] or 'inode ' + str(row['inode'])}" + (f"  {row['chunks']} chunks" if "chunks" in row else "  blocks"))
    if len(files) + len(spaces) > NAMES_SHOWN:
        console.print(f"  ... and {len(files) + len(spaces) - NAMES_SHOWN} more: `kvfs fsck` names all of them afterwards")


async def _accept(manager: ManagerCalls, chain: cluster_pb2.Chain, below: int) -> None:
    request = cluster_pb2.AcceptLossRequest(chain_id=chain.chain_id, chain_version=chain.version, lost_below=below)
    await manager.call("AcceptLoss", request)
    with trio.move_on_after(SERVES_S):
        while True:
            routing = (await manager.call("GetRouting", cluster_pb2.GetRoutingRequest())).routing
            serving = Routing(routing).serving(chain.chain_id)
            if any(target.target_id in serving and target.capacity_bytes for target in routing.targets):
                return
            await trio.sleep(POLL_S)
    raise DeadlineExceeded(f"chain {chain.chain_id} was given up and does not serve after {SERVES_S:.0f} s: see the storage services' logs")
