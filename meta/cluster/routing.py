"""RoutingInfo from the manager's records and what it knows of targets from heartbeats.

Invariant: two messages of one version differ at most in space and local states, which are for people to look at; nothing decides by them.
"""

from __future__ import annotations

from collections.abc import Mapping

from kvfs.common.wire import cluster_pb2 as pb
from kvfs.meta.cluster.registry import Records, chain_to_wire, state_to_wire


def build(records: Records, reports: Mapping[int, pb.TargetReport]) -> pb.RoutingInfo:
    """`reports`: the newest of each target, where there is one."""
    info = pb.RoutingInfo(version=records.version, cluster_id=records.cluster_id)
    info.nodes.extend(records.nodes[node_id] for node_id in sorted(records.nodes))
    info.chains.extend(chain_to_wire(records.chains[chain_id]) for chain_id in sorted(records.chains))
    info.tables.extend(records.tables[table_id] for table_id in sorted(records.tables))
    states = {member.target_id: member.state for chain in records.chains.values() for member in chain.members}
    for target_id in sorted(records.targets):
        target = info.targets.add()
        target.CopyFrom(records.targets[target_id])
        if (state := states.get(target_id)) is not None:
            target.public_state = state_to_wire(state)
        node = records.nodes.get(target.node_id)
        report = reports.get(target_id)
        if node is None or not node.alive:
            target.local_state = pb.LOCAL_OFFLINE
        elif report is not None:
            target.local_state = report.local_state
        if report is not None:
            target.capacity_bytes, target.used_bytes, target.free_bytes = report.capacity_bytes, report.used_bytes, report.free_bytes
    return info


def targets_of_node(info: pb.RoutingInfo, node_id: int) -> list[pb.Target]:
    return [target for target in info.targets if target.node_id == node_id]
