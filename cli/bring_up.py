"""What a new cluster needs once its services run: targets, chains over them, and the wait until every chain serves."""

from __future__ import annotations

import trio

from kvfs.cli.cluster_dir import ClusterDir
from kvfs.cli.manager_calls import ManagerCalls, manager_calls
from kvfs.common.errors import ClusterError, DeadlineExceeded, TransportError
from kvfs.common.wire import cluster_pb2 as pb

DEFAULT_TABLE = 1
BRING_UP_TIMEOUT_S = 60.0
POLL_S = 0.05


async def bring_up(cluster: ClusterDir) -> None:
    """Idempotent: a cluster that has its chain table keeps it. Returns once every chain has a serving target. Raises DeadlineExceeded."""
    async with manager_calls(cluster.managers, cluster.cluster_id) as manager:
        last: Exception | None = None
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
            while not await all_chains_serve(manager):
                await trio.sleep(POLL_S)
            return
        raise DeadlineExceeded(
            f"no chains in service after {BRING_UP_TIMEOUT_S:.0f} s ({last or 'targets are not serving'}): see the storage services' logs"
        )


async def all_chains_serve(manager: ManagerCalls) -> bool:
    """Each chain has a serving target, and each serving target has said how much space it has: `df` is right from the start."""
    routing = (await manager.call("GetRouting", pb.GetRoutingRequest())).routing
    known = all(target.capacity_bytes for target in routing.targets if target.public_state == pb.SERVING)
    return known and bool(routing.chains) and all(any(target.state == pb.SERVING for target in chain.targets) for chain in routing.chains)
