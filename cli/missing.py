"""What of a cluster's data cannot be reached now, and what a person can do: chains that no target serves, with the reason of each. Pure.

A chain is `hopeless` when nothing but a person can bring it back: then nobody waits for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kvfs.common.wire import cluster_pb2 as pb
from kvfs.common.wire import storage_pb2


@dataclass(frozen=True, slots=True)
class Missing:
    chain_id: int
    reason: str
    hopeless: bool


def missing_chains(routing: pb.RoutingInfo, statuses: Mapping[int, storage_pb2.TargetStatus]) -> list[Missing]:
    """`statuses`: what the living services say of their targets."""
    targets = {target.target_id: target for target in routing.targets}
    nodes = {node.node_id: node for node in routing.nodes}
    found = []
    for chain in routing.chains:
        if any(member.state == pb.SERVING for member in chain.targets):
            continue
        last = next((member.target_id for member in chain.targets if member.state == pb.LASTSRV), 0)
        target, status = targets.get(last), statuses.get(last)
        node = nodes.get(target.node_id) if target is not None else None
        others = len(chain.targets) - 1
        behind = f" (its other {others} {'replica is' if others == 1 else 'replicas are'} behind it)" if others else ""
        start = f"chain {chain.chain_id} has no serving target: the last one, target {last} of node {node.node_id if node else 0}{behind}"
        advice = f"or give its data up with `kvfs admin accept-loss {chain.chain_id}`"
        if node is None or not node.alive:
            found.append(Missing(chain.chain_id, f"{start}, is away with its node: start that, {advice}", False))
        elif target is not None and target.blank:
            text = f"{start}, is gone from its disk: bring back the old disk, {advice}"
            found.append(Missing(chain.chain_id, text, True))
        elif status is not None and status.problem:
            found.append(Missing(chain.chain_id, f"{start}, is out of service: {status.problem}; repair it, {advice}", True))
        else:
            found.append(Missing(chain.chain_id, f"{start}, is on its way", False))
    return found
