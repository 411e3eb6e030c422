"""The routing view answers who serves what, and unknown things with the errors that make a caller refresh."""

from __future__ import annotations

import pytest

from kvfs.common.errors import ClusterError, NoServingTarget, UnknownChain, UnknownTarget
from kvfs.common.routing import Routing
from kvfs.common.wire import cluster_pb2 as pb


def routing() -> Routing:
    states = {1: [pb.SERVING, pb.SERVING, pb.SYNCING], 2: [pb.LASTSRV, pb.PUBLIC_OFFLINE], 3: [pb.SERVING, pb.WAITING, pb.SERVING]}
    return Routing(
        pb.RoutingInfo(
            version=9,
            cluster_id="c",
            nodes=[
                pb.Node(node_id=1, role=pb.ROLE_STORAGE, addresses=["tcp://a:1", "unix:///a"], alive=True),
                pb.Node(node_id=2, role=pb.ROLE_STORAGE),
                pb.Node(node_id=3, role=pb.ROLE_META, alive=True),
            ],
            targets=[pb.Target(target_id=chain * 10 + place, node_id=1 + place % 2) for chain in states for place in range(3)],
            chains=[
                pb.Chain(chain_id=chain, targets=[pb.ChainTarget(target_id=chain * 10 + place, state=state) for place, state in enumerate(members)])
                for chain, members in states.items()
            ],
            tables=[pb.ChainTable(table_id=1, chain_ids=[1, 2, 3])],
        )
    )


def test_chains() -> None:
    view = routing()
    assert view.serving(1) == [10, 11] and (view.head(1), view.tail(1)) == (10, 11)
    assert view.serving(2) == []
    for ask in (view.head, view.tail):
        with pytest.raises(NoServingTarget):
            ask(2)
        with pytest.raises(UnknownChain):
            ask(99)


def test_successors() -> None:
    view = routing()

    def successor(chain: int, target: int) -> int | None:
        found = view.successor(chain, target)
        return found.target_id if found else None

    assert [successor(1, target) for target in (10, 11, 12)] == [11, 12, None]
    assert successor(3, 30) == 32, "one that waits is passed over"
    with pytest.raises(UnknownTarget):
        view.successor(1, 30)


def test_nodes_targets_and_tables() -> None:
    view = routing()
    assert (view.version, view.cluster_id) == (9, "c")
    assert view.addresses_of_target(10) == ("tcp://a:1", "unix:///a") and view.node_of_target(11).node_id == 2
    assert [node.node_id for node in view.nodes_with_role(pb.ROLE_STORAGE)] == [1, 2]
    assert [node.node_id for node in view.nodes_with_role(pb.ROLE_STORAGE, alive=True)] == [1]
    assert list(view.table(1).chain_ids) == [1, 2, 3]
    assert {target.target_id for target in view.targets_of_node(2)} == {11, 21, 31}
    with pytest.raises(UnknownTarget):
        view.target(5)
    with pytest.raises(ClusterError):
        view.node(5)
    with pytest.raises(UnknownChain):
        view.table(5)


def test_space_counts_what_a_disk_has_free_once_and_what_its_targets_use_each() -> None:
    places = {1: (1, 0, 100, 50), 2: (1, 0, 30, 55), 3: (1, 1, 5, 1000), 4: (2, 0, 0, 0)}
    targets = [pb.Target(target_id=i, node_id=node, disk=disk, used_bytes=used, free_bytes=free) for i, (node, disk, used, free) in places.items()]
    assert Routing(pb.RoutingInfo(targets=targets)).space() == (135 + 1055, 1055, 135)


def test_an_empty_routing() -> None:
    assert Routing().version == 0 and list(Routing().chains) == [] and Routing().space() == (0, 0, 0)
