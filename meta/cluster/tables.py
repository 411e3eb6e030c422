"""Pure core: balanced chain tables.

A chain is a set of disks, of different nodes, in an order. Wanted, in this order of weight: every disk in its share of chains; every pair of disks of
different nodes in as equal a number of chains as can be (then a failed disk's load falls on all others alike: a balanced incomplete block design
where one exists); every disk head of its share of chains. A local search with restarts, driven by the Random given: the same seed, the same table.
It must never put two replicas of a chain on one node, and its work is bounded (`MAX_STEPS`): with large clusters the result is good, not best.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from kvfs.common.boundary.random import Random
from kvfs.common.errors import InvalidArgument, NotEnoughTargets

MIN_TARGETS_PER_DISK = 4
MAX_TARGETS_PER_DISK = 64
MAX_REPLICAS = 8
RESTARTS = 40
MAX_STEPS = 120_000
"""Proposed exchanges in all: about 0.3 s, the longest that the manager may be away from its heartbeats."""


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """A disk."""

    node_id: int
    disk: int


@dataclass(frozen=True, slots=True)
class Layout:
    """Chains as tuples of places, head first; and how often the rarest and the most frequent pair of disks of different nodes share a chain."""

    chains: tuple[tuple[Place, ...], ...]
    best_pair: int
    worst_pair: int


def choose_targets_per_disk(disks: int, replicas: int) -> int:
    """At least four, dividing into whole chains, and if possible so that every pair of disks can share exactly the same number of chains."""
    candidates = [count for count in range(MIN_TARGETS_PER_DISK, MIN_TARGETS_PER_DISK + replicas) if disks * count % replicas == 0]
    for count in candidates:
        if disks > 1 and count * (replicas - 1) % (disks - 1) == 0:
            return count
    return candidates[0]


def generate(places: Sequence[Place], *, replicas: int, targets_per_disk: int, random: Random) -> Layout:
    """As many chains as the disks have targets for."""
    places = sorted(set(places))
    nodes = sorted({place.node_id for place in places})
    if not 1 <= replicas <= MAX_REPLICAS:
        raise InvalidArgument(f"a chain table with {replicas} replicas: 1 to {MAX_REPLICAS}")
    if not 1 <= targets_per_disk <= MAX_TARGETS_PER_DISK:
        raise InvalidArgument(f"{targets_per_disk} targets per disk: 1 to {MAX_TARGETS_PER_DISK}")
    if len(nodes) < replicas:
        raise NotEnoughTargets(
            f"{replicas} replicas need storage on {replicas} different nodes, and there are {len(nodes)}: "
            "start more storage services, or ask for fewer replicas"
        )
    quotas = _quotas(places, replicas, targets_per_disk)
    count = sum(quotas.values()) // replicas
    if count == 0:
        raise NotEnoughTargets(
            f"{len(places)} disks with {targets_per_disk} targets each do not make one chain of {replicas} replicas: ask for more targets per disk"
        )
    search = _Search(places, quotas, count, replicas, random)
    return search.run()


def pair_counts(chains: Sequence[Sequence[Place]], places: Sequence[Place]) -> dict[tuple[Place, Place], int]:
    """For each pair of disks of different nodes, the chains that both are in."""
    ordered = sorted(set(places))
    counts = {(a, b): 0 for i, a in enumerate(ordered) for b in ordered[i + 1 :] if a.node_id != b.node_id}
    for chain in chains:
        members = sorted(chain)
        for i, a in enumerate(members):
            for b in members[i + 1 :]:
                counts[a, b] = counts.get((a, b), 0) + 1
    return counts


def spread(chains: Sequence[Sequence[Place]], places: Sequence[Place]) -> tuple[int, int]:
    """(fewest, most) chains that a pair of disks shares; (0, 0) where there are no pairs."""
    counts = pair_counts(chains, places).values()
    return (min(counts), max(counts)) if counts else (0, 0)


def choose(chains: Sequence[Sequence[Place]], rest: Sequence[Place], candidates: Sequence[Place]) -> Place:
    """Where one more replica of the chain that `rest` has is placed best: on the disk with the fewest chains; of several, on the one that shares the
    fewest with those it would be with. `candidates` is not empty, and on none of the nodes of `rest`."""
    load = Counter(place for chain in chains for place in chain)
    pairs: Counter[tuple[Place, Place]] = Counter((a, b) for chain in chains for a in chain for b in chain if a != b)
    return min(candidates, key=lambda place: (load[place], sum(pairs[place, other] ** 2 for other in rest), place))


def _quotas(places: Sequence[Place], replicas: int, targets_per_disk: int) -> dict[Place, int]:
    """How many chains each disk is in. A node with more disks than the rest together can match gets fewer targets on each."""
    disks: dict[int, list[Place]] = {}
    for place in places:
        disks.setdefault(place.node_id, []).append(place)
    limit = {node: len(own) * targets_per_disk for node, own in disks.items()}
    count = sum(limit.values()) // replicas
    while count and sum(min(most, count) for most in limit.values()) < replicas * count:
        count -= 1
    shares = {node: min(most, count) for node, most in limit.items()}
    # What is above a whole number of chains is taken from those that have most.
    while sum(shares.values()) > replicas * count:
        fullest = max(shares, key=lambda node: (shares[node], node))
        shares[fullest] -= 1
    quotas = {}
    for node, own in disks.items():
        each, rest = divmod(shares[node], len(own))
        for index, place in enumerate(own):
            quotas[place] = each + (1 if index < rest else 0)
    return quotas


class _Search:
    """Chains as lists of disk numbers. Cost: the sum of squared pair counts, least when all pairs are alike."""

    def __init__(self, places: Sequence[Place], quotas: dict[Place, int], count: int, replicas: int, random: Random) -> None:
        self._places = places
        self._node = [place.node_id for place in places]
        self._quota = [quotas[place] for place in places]
        self._count = count
        self._replicas = replicas
        self._random = random

    def run(self) -> Layout:
        best: list[list[int]] = []
        best_cost = -1
        steps_left = MAX_STEPS
        for _ in range(RESTARTS):
            chains = self._start()
            pairs = self._pairs(chains)
            goal = self._lower_bound(pairs)
            cost, used = self._improve(chains, pairs, goal, min(steps_left, max(2000, MAX_STEPS // 8)))
            steps_left -= used
            if best_cost < 0 or cost < best_cost:
                best, best_cost = [list(chain) for chain in chains], cost
            if best_cost <= goal or steps_left <= 0:
                break
        ordered = self._order(best)
        chains_of_places = tuple(tuple(self._places[disk] for disk in chain) for chain in ordered)
        least, most = spread(chains_of_places, self._places)
        return Layout(chains_of_places, best_pair=least, worst_pair=most)

    def _start(self) -> list[list[int]]:
        """Fill chain by chain, always from the nodes with most left: that never gets stuck (Gale-Ryser), and ties are broken by chance."""
        left = list(self._quota)
        of_node: dict[int, list[int]] = {}
        for disk, node in enumerate(self._node):
            of_node.setdefault(node, []).append(disk)
        chains = []
        for _ in range(self._count):
            nodes = list(of_node)
            self._random.shuffle(nodes)
            nodes.sort(key=lambda node: -sum(left[disk] for disk in of_node[node]))
            chain = []
            for node in nodes[: self._replicas]:
                disk = max(of_node[node], key=lambda disk: left[disk])
                left[disk] -= 1
                chain.append(disk)
            chains.append(chain)
        return chains

    def _pairs(self, chains: list[list[int]]) -> list[list[int]]:
        size = len(self._places)
        pairs = [[0] * size for _ in range(size)]
        for chain in chains:
            for a in chain:
                for b in chain:
                    if a != b:
                        pairs[a][b] += 1
        return pairs

    def _lower_bound(self, pairs: list[list[int]]) -> int:
        """The cost if all pairs of different nodes were as equal as whole numbers can be."""
        size = len(pairs)
        values = [pairs[a][b] for a in range(size) for b in range(a + 1, size) if self._node[a] != self._node[b]]
        if not values:
            return 0
        each, rest = divmod(sum(values), len(values))
        return (len(values) - rest) * each * each + rest * (each + 1) * (each + 1)

    def _improve(self, chains: list[list[int]], pairs: list[list[int]], goal: int, steps: int) -> tuple[int, int]:
        """Exchange a disk of one chain for a disk of another, keeping what is no worse (level moves lead off plateaus). The cost, and steps used."""
        size = len(pairs)
        cost = sum(pairs[a][b] ** 2 for a in range(size) for b in range(a + 1, size))
        if len(chains) < 2 or self._replicas < 2:
            return cost, 0
        pick, node = self._random.randrange, self._node
        for step in range(steps):
            if cost <= goal:
                return cost, step
            first, second = chains[pick(len(chains))], chains[pick(len(chains))]
            i, j = pick(self._replicas), pick(self._replicas)
            a, b = first[i], second[j]
            if a == b or first is second:
                continue
            rest_first = [disk for disk in first if disk != a]
            rest_second = [disk for disk in second if disk != b]
            if any(node[disk] == node[b] for disk in rest_first) or any(node[disk] == node[a] for disk in rest_second):
                continue
            # a leaves rest_first for rest_second, b the other way. A disk that is in both rests keeps its counts.
            only_first = [disk for disk in rest_first if disk not in rest_second]
            only_second = [disk for disk in rest_second if disk not in rest_first]
            change = sum(2 - 2 * pairs[a][disk] + 2 * pairs[b][disk] for disk in only_first)
            change += sum(2 - 2 * pairs[b][disk] + 2 * pairs[a][disk] for disk in only_second)
            if change > 0:
                continue
            for gain, loss, disks in ((b, a, only_first), (a, b, only_second)):
                for disk in disks:
                    pairs[gain][disk] += 1
                    pairs[disk][gain] += 1
                    pairs[loss][disk] -= 1
                    pairs[disk][loss] -= 1
            first[i], second[j] = b, a
            cost += change
        return cost, steps

    def _order(self, chains: list[list[int]]) -> list[list[int]]:
        """Order each chain so that every disk is head, and tail, of its share; then the table so that neighbouring chains have different heads."""
        heads = [0] * len(self._places)
        tails = [0] * len(self._places)
        ordered = []
        for chain in chains:
            members = list(chain)
            self._random.shuffle(members)
            head = min(members, key=lambda disk: heads[disk])
            members.remove(head)
            heads[head] += 1
            if members:
                tail = min(members, key=lambda disk: tails[disk])
                members.remove(tail)
                tails[tail] += 1
                members.append(tail)
            ordered.append([head, *members])
        ordered = self._even_heads(ordered, heads)
        self._random.shuffle(ordered)
        by_head: dict[int, list[list[int]]] = {}
        for chain in ordered:
            by_head.setdefault(chain[0], []).append(chain)
        queues = sorted(by_head.values(), key=len, reverse=True)
        return [queue[turn] for turn in range(len(queues[0])) for queue in queues if turn < len(queue)]

    @staticmethod
    def _even_heads(chains: list[list[int]], heads: list[int]) -> list[list[int]]:
        """Hand the head over within a chain while that brings two disks' shares closer."""
        moved = True
        while moved:
            moved = False
            for chain in chains:
                place = min(range(len(chain)), key=lambda index: heads[chain[index]])
                if heads[chain[0]] - heads[chain[place]] > 1:
                    heads[chain[0]] -= 1
                    heads[chain[place]] += 1
                    chain[0], chain[place] = chain[place], chain[0]
                    moved = True
        return chains
