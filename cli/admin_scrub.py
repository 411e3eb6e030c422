"""`kvfs admin scrub`: read a target's stored bytes against their checksums now, and mend from the chain what is damaged."""

from __future__ import annotations

from typing import Any

import click
import trio
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from kvfs.cli.context import Options, common_options, console, err_console, human_bytes, print_json, table
from kvfs.cli.manager_calls import ManagerCalls, channel_pool, manager_addresses, target_statuses
from kvfs.cli.process import run_command
from kvfs.cli.status import describe_scrub
from kvfs.common.errors import TargetNotServing, UnknownTarget
from kvfs.common.routing import Routing
from kvfs.common.wire import cluster_pb2, storage_pb2
from kvfs.common.wire.channel import ChannelPool
from kvfs.common.wire.service import method

SCRUB = method("Storage", "Scrub")
POLL_S = 0.2
CALL_TIMEOUT_S = 10.0
AWAY_S = 30.0
"""A target that leaves its chain meanwhile is waited for so long."""


@click.command()
@click.argument("targets", metavar="[TARGET]...", type=int, nargs=-1)
@click.option("--all", "everything", is_flag=True, help="All targets that serve.")
@click.option("--now", is_flag=True, help="As fast as it goes, and wait for the end. Exit status 1 when damage remains.")
@common_options
def scrub(options: Options, targets: tuple[int, ...], everything: bool, now: bool) -> None:
    """Read every stored byte of targets against its checksum; what is damaged is mended from the chain.

    Targets do this by themselves, one pass a week. Without --now a pass begins, in the background and at the configured rate; without targets the
    state of each is shown.
    """
    if targets and everything:
        raise click.UsageError("name targets or say --all")
    if now and not (targets or everything):
        raise click.UsageError("--now needs targets, or --all")

    async def main() -> list[dict[str, Any]]:
        managers, cluster_id = manager_addresses(options.cluster_spec())
        async with channel_pool(cluster_id) as pool:
            return await _Scrubs(pool, ManagerCalls(pool, managers)).run(list(targets), everything, now)

    rows = run_command(main)
    if options.as_json:
        print_json(rows)
    else:
        _print(rows)
    if now and any(row["damaged"] for row in rows):
        raise click.exceptions.Exit(1)


def _print(rows: list[dict[str, Any]]) -> None:
    made = table("target", "scrub", "passes", "chunks", "bytes", "found", "mended", "damaged now", right=("passes", "chunks", "bytes", "found"))
    for row in rows:
        counts = (row["found"], row["repaired"], row["damaged"])
        read = (str(row["checked_chunks"]), human_bytes(row["checked_bytes"]))
        made.add_row(str(row["target"]), row["state"], str(row["passes"]), *read, *map(str, counts))
    console.print(made)
    if any(row["damaged"] for row in rows):
        console.print("what is damaged no replica has whole: `kvfs fsck` says what it belongs to", style="red")


class _Scrubs:
    """The passes that one command begins."""

    def __init__(self, pool: ChannelPool, manager: ManagerCalls) -> None:
        self._pool = pool
        self._manager = manager

    async def run(self, targets: list[int], everything: bool, now: bool) -> list[dict[str, Any]]:
        """The state of each target's scrub when it is over, or begun."""
        routing = await self._routing()
        known = {target.target_id for target in routing.message.targets}
        for target_id in targets:
            if target_id not in known:
                raise UnknownTarget(f"there is no target {target_id}: `kvfs admin list-targets` shows them")
        if everything:
            targets = sorted(target_id for chain in routing.chains for target_id in routing.serving(chain.chain_id))
        passes = {target_id: await self._begin(routing, target_id, now) for target_id in targets}
        statuses = await target_statuses(self._pool, routing.message)
        if now:
            statuses = await self._wait(passes)
        return [describe_scrub(status) for target_id, status in sorted(statuses.items()) if not targets or target_id in passes]

    async def _routing(self) -> Routing:
        return Routing((await self._manager.call("GetRouting", cluster_pb2.GetRoutingRequest())).routing)

    async def _begin(self, routing: Routing, target_id: int, now: bool) -> int:
        request = storage_pb2.ScrubRequest(target_id=target_id, at_once=now)
        reply = await self._pool.call(routing.addresses_of_target(target_id), SCRUB, request, timeout_s=CALL_TIMEOUT_S)
        return int(reply.number)

    async def _wait(self, passes: dict[int, int]) -> dict[int, storage_pb2.TargetStatus]:
        columns = (TextColumn("scrubbing"), BarColumn(), MofNCompleteColumn(), TextColumn("chunks"), TimeRemainingColumn())
        found: dict[int, storage_pb2.TargetStatus] = {}
        seen_s = dict.fromkeys(passes, trio.current_time())
        with Progress(*columns, console=err_console, transient=True, disable=not err_console.is_terminal) as progress:
            bar = progress.add_task("scrub", total=None)
            while True:
                routing = await self._routing()
                found |= await target_statuses(self._pool, routing.message)
                left = [target_id for target_id, number in passes.items() if target_id not in found or found[target_id].scrub.passes < number]
                if not left:
                    return found
                self._check_serving(routing, left, seen_s)
                progress.update(bar, total=sum(self._chunks(found, target_id) for target_id in passes), completed=self._done(found, passes))
                await trio.sleep(POLL_S)

    def _check_serving(self, routing: Routing, left: list[int], seen_s: dict[int, float]) -> None:
        now_s = trio.current_time()
        serving = {target_id for chain in routing.chains for target_id in routing.serving(chain.chain_id)}
        for target_id in left:
            if target_id in serving:
                seen_s[target_id] = now_s
            elif now_s - seen_s[target_id] > AWAY_S:
                raise TargetNotServing(f"target {target_id} has left its chain: its scrub goes on when it serves again (`kvfs status`)")

    def _chunks(self, found: dict[int, storage_pb2.TargetStatus], target_id: int) -> int:
        return found[target_id].scrub.total_chunks if target_id in found else 0

    def _done(self, found: dict[int, storage_pb2.TargetStatus], passes: dict[int, int]) -> int:
        done = 0
        for target_id, number in passes.items():
            if target_id in found:
                scrub = found[target_id].scrub
                done += scrub.total_chunks if scrub.passes >= number else scrub.checked_chunks
        return done
