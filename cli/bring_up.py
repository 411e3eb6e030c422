"""What a cluster needs once its services run: targets, chains over them, and the wait until every chain serves that can."""

from __future__ import annotations

import trio

from kvfs.cli.cluster_dir import ClusterDir
from kvfs.cli.manager_calls import ManagerCalls, channel_pool, target_statuses
from kvfs.cli.missing import missing_chains
from kvfs.common.errors import ClusterError, DeadlineExceeded, TransportError
from kvfs.common.wire import cluster_pb2 as pb

DEFAULT_TABLE = 1
BRING_UP_TIMEOUT_S = 60.0
POLL_S = 0.05
LOOK_FOR_DAMAGE_S = 1.0
STATUS_TIMEOUT_S = 5.0


async def bring_up(cluster: ClusterDir) -> None:
    """Idempotent: a cluster that has its chain table keeps it. Returns once every chain has a serving target, but for those that only a person can
    bring back: the cluster starts without them, and `kvfs status` says what is missing. DeadlineExceeded when none serves."""
    async with channel_pool(cluster.cluster_id) as pool:
        manager = ManagerCalls(pool, cluster.managers)
        last: Exception | None = None
        serving = False
        with trio.move_on_after(BRING_UP_TIMEOUT_S):
            while True:
                try:
                    request = pb.CreateTargetsRequest(
                        table_id=DEFAULT_TABLE, replicas=cluster.replicas, expected_nodes=cluster.storage, description="default"
                    )
                    await manager.call("CreateTargets", request, timeout_s=BRING_UP_TIMEOUT_S)
                    break
                except (ClusterError, TransportError) as error:  # storage services that restart count only once they are alive again
                    last = error
                    await trio.sleep(POLL_S)
            look_at_s = trio.current_time() + LOOK_FOR_DAMAGE_S
            while not all_chains_serve(routing := await get_routing(manager)):
                serving = any(target.public_state == pb.SERVING for target in routing.targets)
                if trio.current_time() >= look_at_s:
                    missing = missing_chains(routing, await target_statuses(pool, routing, timeout_s=STATUS_TIMEOUT_S))
                    if missing and all(chain.hopeless for chain in missing):
                        return
                    look_at_s = trio.current_time() + LOOK_FOR_DAMAGE_S
                await trio.sleep(POLL_S)
            return
        if not serving:
            raise DeadlineExceeded(
                f"no chains in service after {BRING_UP_TIMEOUT_S:.0f} s ({last or 'targets are not serving'}): see the storage services' logs"
            )


async def get_routing(manager: ManagerCalls) -> pb.RoutingInfo:
    routing: pb.RoutingInfo = (await manager.call("GetRouting", pb.GetRoutingRequest())).routing
    return routing


def all_chains_serve(routing: pb.RoutingInfo) -> bool:
    """Each chain has a serving target, and each serving target has said how much space it has: `df` is right from the start."""
    known = all(target.capacity_bytes for target in routing.targets if target.public_state == pb.SERVING)
    return known and bool(routing.chains) and all(any(target.state == pb.SERVING for target in chain.targets) for chain in routing.chains)
