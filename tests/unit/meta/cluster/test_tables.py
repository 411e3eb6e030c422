"""Balanced chain tables: pairs, nodes, heads, and what cannot be laid out."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfs.common.boundary.random import SeededRandom
from kvfs.common.errors import InvalidArgument, NotEnoughTargets
from kvfs.meta.cluster.tables import Layout, Place, choose_targets_per_disk, generate, pair_counts, spread


def disks(nodes: int, each: int = 1) -> list[Place]:
    return [Place(node + 1, disk) for node in range(nodes) for disk in range(each)]


def make(places: list[Place], replicas: int, targets: int, seed: int = 1) -> Layout:
    return generate(places, replicas=replicas, targets_per_disk=targets, random=SeededRandom(seed))


@pytest.mark.parametrize("seed", range(20))
def test_six_disks_five_targets_three_replicas_every_pair_twice(seed: int) -> None:
    layout = make(disks(6), 3, 5, seed)
    assert len(layout.chains) == 10
    assert set(pair_counts(layout.chains, disks(6)).values()) == {2}
    assert (layout.best_pair, layout.worst_pair) == (2, 2)


@pytest.mark.parametrize(
    ("nodes", "replicas", "targets", "pairs"), [(3, 3, 4, 4), (7, 3, 3, 1), (9, 3, 4, 1), (13, 4, 4, 1), (5, 3, 6, 3), (4, 2, 3, 1)]
)
def test_designs_that_exist_are_found(nodes: int, replicas: int, targets: int, pairs: int) -> None:
    layout = make(disks(nodes), replicas, targets)
    assert (layout.best_pair, layout.worst_pair) == (pairs, pairs)


@pytest.mark.parametrize(
    ("nodes", "replicas", "targets", "chains"), [(3, 3, 4, 4), (3, 1, 4, 12), (1, 1, 4, 4), (2, 2, 4, 4), (6, 3, 5, 10), (4, 3, 6, 8)]
)
def test_targets_chosen_for_small_clusters(nodes: int, replicas: int, targets: int, chains: int) -> None:
    assert choose_targets_per_disk(nodes, replicas) == targets
    assert len(make(disks(nodes), replicas, targets).chains) == chains


def test_several_disks_a_node_never_two_replicas_on_one_node() -> None:
    layout = make(disks(4, 3), 3, 4)
    assert len(layout.chains) == 16
    assert all(len({place.node_id for place in chain}) == 3 for chain in layout.chains)
    assert layout.worst_pair - layout.best_pair <= 1


def test_heads_and_neighbours_are_spread() -> None:
    layout = make(disks(7), 3, 6)
    heads = [chain[0] for chain in layout.chains]
    assert max(heads.count(place) for place in disks(7)) - min(heads.count(place) for place in disks(7)) <= 1
    # A file's first chunks go to different heads.
    assert all(a != b for a, b in pairwise(heads))


def test_same_seed_same_table() -> None:
    assert make(disks(8, 2), 3, 3, seed=5) == make(disks(8, 2), 3, 3, seed=5)
    assert make(disks(8, 2), 3, 3, seed=5) != make(disks(8, 2), 3, 3, seed=6)


def test_too_few_nodes_say_so() -> None:
    with pytest.raises(NotEnoughTargets, match=r"3 replicas need storage on 3 different nodes, and there are 2"):
        make(disks(2, 4), 3, 4)
    with pytest.raises(NotEnoughTargets, match="there are 0"):
        make([], 1, 4)


@pytest.mark.parametrize(("replicas", "targets"), [(0, 4), (9, 4), (3, 0), (3, 65)])
def test_limits(replicas: int, targets: int) -> None:
    with pytest.raises(InvalidArgument):
        make(disks(9), replicas, targets)


def test_a_node_with_most_of_the_disks() -> None:
    places = [Place(1, 0), Place(1, 1), Place(1, 2), Place(1, 3), Place(2, 0), Place(3, 0)]
    layout = make(places, 3, 4)
    # Nodes 2 and 3 have four targets each, so there are four chains, each with one of the first node's disks.
    assert len(layout.chains) == 4
    assert sorted(place.disk for chain in layout.chains for place in chain if place.node_id == 1) == [0, 1, 2, 3]


def test_spread_without_pairs() -> None:
    assert spread([[Place(1, 0)]], [Place(1, 0)]) == (0, 0)


@settings(max_examples=60, deadline=None)
@given(each=st.lists(st.integers(1, 4), min_size=1, max_size=7), replicas=st.integers(1, 4), targets=st.integers(1, 8), seed=st.integers(0, 5))
def test_any_cluster(each: list[int], replicas: int, targets: int, seed: int) -> None:
    places = [Place(node + 1, disk) for node, count in enumerate(each) for disk in range(count)]
    if len(each) < replicas:
        with pytest.raises(NotEnoughTargets):
            make(places, replicas, targets, seed)
        return
    try:
        layout = make(places, replicas, targets, seed)
    except NotEnoughTargets:
        assert sum(each) * targets < replicas
        return
    uses = {place: sum(place in chain for chain in layout.chains) for place in places}
    assert all(len(chain) == replicas == len({place.node_id for place in chain}) for chain in layout.chains)
    assert all(count <= targets for count in uses.values())
    for node in range(len(each)):
        own = [uses[place] for place in places if place.node_id == node + 1]
        assert max(own) - min(own) <= 1
    assert len(layout.chains) <= sum(each) * targets // replicas
    if len(set(each)) == 1:
        assert len(layout.chains) == sum(each) * targets // replicas
