"""An immutable view over RoutingInfo: which nodes, targets, chains and chain tables there are, at one version.

Must never be changed in place: a newer RoutingInfo makes a new Routing, and whoever holds the older one sees a consistent picture.
"""

from __future__ import annotations

from collections.abc import Iterable

from kvfs.common.errors import ChainError, ClusterError, NoServingTarget, UnknownChain, UnknownTarget
from kvfs.common.wire import cluster_pb2 as pb


class Routing:
    __slots__ = ("_chains", "_nodes", "_serving", "_tables", "_targets", "cluster_id", "message", "version")

    def __init__(self, message: pb.RoutingInfo | None = None) -> None:
        self.message = message if message is not None else pb.RoutingInfo()
        self.version: int = self.message.version
        self.cluster_id: str = self.message.cluster_id
        self._nodes = {node.node_id: node for node in self.message.nodes}
        self._targets = {target.target_id: target for target in self.message.targets}
        self._chains = {chain.chain_id: chain for chain in self.message.chains}
        self._tables = {table.table_id: table for table in self.message.tables}
        self._serving = {
            chain.chain_id: [member.target_id for member in chain.targets if member.state == pb.SERVING] for chain in self.message.chains
        }

    def __repr__(self) -> str:
        return f"Routing(version={self.version}, nodes={len(self._nodes)}, chains={len(self._chains)})"

    @property
    def nodes(self) -> Iterable[pb.Node]:
        return self._nodes.values()

    @property
    def targets(self) -> Iterable[pb.Target]:
        return self._targets.values()

    @property
    def chains(self) -> Iterable[pb.Chain]:
        return self._chains.values()

    @property
    def tables(self) -> Iterable[pb.ChainTable]:
        return self._tables.values()

    def node(self, node_id: int) -> pb.Node:
        try:
            return self._nodes[node_id]
        except KeyError:
            raise ClusterError(f"node {node_id} is not in routing version {self.version}") from None

    def target(self, target_id: int) -> pb.Target:
        try:
            return self._targets[target_id]
        except KeyError:
            raise UnknownTarget(f"target {target_id} is not in routing version {self.version}") from None

    def chain(self, chain_id: int) -> pb.Chain:
        try:
            return self._chains[chain_id]
        except KeyError:
            raise UnknownChain(f"chain {chain_id} is not in routing version {self.version}") from None

    def table(self, table_id: int) -> pb.ChainTable:
        try:
            return self._tables[table_id]
        except KeyError:
            raise UnknownChain(f"chain table {table_id} is not in routing version {self.version}") from None

    def serving(self, chain_id: int) -> list[int]:
        """Target ids that serve, head first. Do not change the list."""
        try:
            return self._serving[chain_id]
        except KeyError:
            raise UnknownChain(f"chain {chain_id} is not in routing version {self.version}") from None

    def holding(self, chain_id: int) -> list[int]:
        """Target ids that take the chain's writes: those that serve, head first, then who is being brought up to date."""
        return [member.target_id for member in self.chain(chain_id).targets if member.state in (pb.SERVING, pb.SYNCING)]

    def head(self, chain_id: int) -> int:
        """The target that takes the chain's writes."""
        serving = self.serving(chain_id)
        if not serving:
            raise NoServingTarget(f"chain {chain_id} has no serving target in routing version {self.version}")
        return serving[0]

    def tail(self, chain_id: int) -> int:
        """The target that commits first: the last that serves."""
        serving = self.serving(chain_id)
        if not serving:
            raise NoServingTarget(f"chain {chain_id} has no serving target in routing version {self.version}")
        return serving[-1]

    def successor(self, chain_id: int, target_id: int) -> pb.ChainTarget | None:
        """Who gets the updates that `target_id` forwards: the next that serves or is syncing; None for the last."""
        members = self.chain(chain_id).targets
        for place, member in enumerate(members):
            if member.target_id == target_id:
                for follower in members[place + 1 :]:
                    if follower.state in (pb.SERVING, pb.SYNCING):
                        return follower
                return None
        raise UnknownTarget(f"target {target_id} is not in chain {chain_id} of routing version {self.version}")

    def node_of_target(self, target_id: int) -> pb.Node:
        try:
            return self._nodes[self.target(target_id).node_id]
        except KeyError:
            raise ChainError(f"target {target_id} is on a node that routing version {self.version} lacks") from None

    def addresses_of_target(self, target_id: int) -> tuple[str, ...]:
        return tuple(self.node_of_target(target_id).addresses)

    def targets_of_node(self, node_id: int) -> list[pb.Target]:
        return [target for target in self._targets.values() if target.node_id == node_id]

    def nodes_with_role(self, role: pb.NodeRole, *, alive: bool = False) -> list[pb.Node]:
        return [node for node in self._nodes.values() if node.role == role and (node.alive or not alive)]

    def space(self) -> tuple[int, int, int]:
        """(capacity, free, used) of all disks, in bytes, replicas counted each. The targets of a disk share what it has free, not what they use."""
        free: dict[tuple[int, int], int] = {}
        used = 0
        for target in self._targets.values():
            disk = (target.node_id, target.disk)
            free[disk] = max(free.get(disk, 0), target.free_bytes)
            used += target.used_bytes
        return used + sum(free.values()), sum(free.values()), used
