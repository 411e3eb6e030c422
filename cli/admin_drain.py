"""`kvfs admin drain`: move the chains of a node or of targets elsewhere, so that it or its disk can go."""

from __future__ import annotations

from typing import Any

import click
import trio
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from kvfs.cli.cluster_dir import FIRST_STORAGE_NODE
from kvfs.cli.context import Options, common_options, console, err_console, print_json, table
from kvfs.cli.manager_calls import ManagerCalls, channel_pool, manager_addresses, target_statuses
from kvfs.cli.process import run_command
from kvfs.cli.status import describe_drain
from kvfs.common.errors import InvalidArgument
from kvfs.common.ids import TARGETS_OF_NODE
from kvfs.common.wire import base_pb2, cluster_pb2
from kvfs.common.wire.channel import ChannelPool

POLL_S = 0.2


@click.command()
@click.argument("what", metavar="NODE|TARGET...", nargs=-1, required=True)
@click.option("--cancel", is_flag=True, help="Undo what is not done; let the disks of what is done be used again.")
@click.option("--no-wait", is_flag=True, help="Return at once; the cluster goes on by itself.")
@common_options
def drain(options: Options, what: tuple[str, ...], cancel: bool, no_wait: bool) -> None:
    """Move the chains of a storage node (its number, or its name as `kvfs status` has it) or of single targets to other disks.

    Chains keep all their replicas on the way. The cluster does it by itself: when this command is interrupted it goes on, and the same command again
    watches it. When it is done the service can be stopped and its disks removed.
    """
    request = _request(options, what)
    request.cancel = cancel

    async def main() -> list[dict[str, Any]]:
        managers, cluster_id = manager_addresses(options.cluster_spec())
        async with channel_pool(cluster_id) as pool:
            manager = ManagerCalls(pool, managers)
            drains = list((await manager.call("Drain", request)).drains)
            if not no_wait:
                drains = await _watch(pool, manager, drains)
            return [describe_drain(drain) for drain in drains]

    try:
        rows = run_command(main)
    except KeyboardInterrupt:
        err_console.print("kvfs: it goes on without you: the same command again watches it, with --cancel it is undone")
        raise
    if options.as_json:
        print_json(rows)
    elif cancel:
        console.print("cancelled" if not rows else "being cancelled")
    elif not rows:
        console.print("nothing to move")
    else:
        print_drains(rows)


def print_drains(rows: list[dict[str, Any]]) -> None:
    made = table("target", "chain", "replacement", "state")
    for row in rows:
        made.add_row(str(row["target"]), str(row["chain"]), str(row["replacement"] or "-"), row["state"])
    console.print(made)


def _request(options: Options, what: tuple[str, ...]) -> cluster_pb2.DrainRequest:
    numbers = [_number(options, word) for word in what]
    nodes = [number for number in numbers if number < TARGETS_OF_NODE]
    if nodes and len(numbers) > 1:
        raise click.UsageError("name one node, or targets")
    if nodes:
        return cluster_pb2.DrainRequest(node_id=nodes[0])
    return cluster_pb2.DrainRequest(target_ids=numbers)


def _number(options: Options, word: str) -> int:
    """Of a node (small) or a target. A name as `kvfs status` shows it: storage-2."""
    if word.isdigit():
        return int(word)
    name = word.removeprefix("storage-")
    if name == word or not name.isdigit():
        raise InvalidArgument(f"{word!r} is neither a node nor a target: `kvfs status` and `kvfs admin list-targets` show them")
    return int(name) + (FIRST_STORAGE_NODE if options.directory() is not None else 0)


async def _watch(pool: ChannelPool, manager: ManagerCalls, drains: list[cluster_pb2.Drain]) -> list[cluster_pb2.Drain]:
    """Until all of them are done, or, cancelled, gone. What there is then."""
    wanted = {drain.target_id for drain in drains}
    columns = (TextColumn("moving"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=err_console, transient=True, disable=not err_console.is_terminal) as progress:
        bar = progress.add_task("", total=len(wanted))
        while True:
            found = [drain for drain in (await manager.call("ListDrains", base_pb2.Empty())).drains if drain.target_id in wanted]
            if all(drain.done for drain in found):
                return found
            progress.update(bar, completed=len(wanted) - sum(not drain.done for drain in found), description=await _words(pool, manager, found))
            await trio.sleep(POLL_S)


async def _words(pool: ChannelPool, manager: ManagerCalls, drains: list[cluster_pb2.Drain]) -> str:
    """What those under way are doing."""
    routing = (await manager.call("GetRouting", cluster_pb2.GetRoutingRequest())).routing
    chains = {drain.chain_id for drain in drains if not drain.done}
    feeding = [status for status in (await target_statuses(pool, routing)).values() if status.chain_id in chains and status.sync_total_chunks]
    copied, total = sum(status.sync_done_chunks for status in feeding), sum(status.sync_total_chunks for status in feeding)
    waiting = sum(drain.state == "waits for a place" for drain in drains)
    words = ["chains"]
    if total:
        words.append(f"{min(copied, total)} of {total} chunks of the next ones copied")
    if waiting:
        words.append(f"{waiting} not begun")
    return ", ".join(words)
