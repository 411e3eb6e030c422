"""Runs that dwell on what seldom meets by chance: every third seed is one of these instead of a run of the general kind.

A small cluster with long chains and few chunks, and faults that hold open what usually lasts milliseconds: a target that returns slowly while its
predecessor is cut off, a service and clients that live on with old routing, bits that turn while everybody reads. Their works also cut files while
targets return, and open files that are being unlinked (stress_works.py, stress_faults.py). Most of the mistakes in planted.py only these runs meet.
"""

from __future__ import annotations

from tests.sim.faults import Fault, kill, kill_at_a_disk_operation, resets, slow_store
from tests.sim.stress_faults import bit_rot, late_forward, left_behind, slow_return
from tests.sim.stress_works import Churn, Cuts, Opened, Recycled, Watch
from tests.sim.work import Pace, Work
from tests.sim.world import KIB, Shape

from kvfs.common.boundary.random import Random

EVERY = 3
_WEIGHTS: dict[Fault, int] = {
    slow_return: 5,
    left_behind: 5,
    late_forward: 3,
    bit_rot: 2,
    resets: 1,
    kill_at_a_disk_operation: 1,
    kill: 1,
    slow_store: 1,
}
_FAULTS = [fault.__name__ for fault, weight in _WEIGHTS.items() for _ in range(weight)]


def is_stress(seed: int) -> bool:
    return seed % EVERY == 0


def faults_of(random: Random, busy_s: float) -> list[tuple[float, str, float]]:
    """(when, which, how long)"""
    return sorted((random.uniform(0, busy_s), random.choice(_FAULTS), random.uniform(2, 7)) for _ in range(2 + random.randrange(3)))


def shape_of(random: Random) -> Shape:
    return Shape(storages=3, replicas=3 if random.randrange(4) else 2, resync_at_once=1, resync_batch_bytes=64 * KIB)


def works_of(random: Random) -> tuple[tuple[type[Work], ...], ...]:
    others: list[type[Work]] = [Cuts, Opened, Recycled, Cuts]
    random.shuffle(others)
    return tuple((Churn, Watch, work) for work in others[:3])


def pace_of(random: Random) -> Pace:
    return Pace(operations=40 + random.randrange(20), pause_s=random.choice((0.2, 0.3)), keys=4)
