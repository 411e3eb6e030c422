"""The boundaries that every service has, together: what a service is given instead of reaching outside by itself.

Each server adds what it alone needs (a disk, a store). Without arguments everything is real.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from kvfs.common.boundary.clock import Clock, SystemClock
from kvfs.common.boundary.net import Net
from kvfs.common.boundary.random import Random, SystemRandom
from kvfs.common.boundary.system_net import SystemNet


@dataclass(frozen=True, slots=True)
class Boundaries:
    clock: Clock = field(default_factory=SystemClock)
    random: Random = field(default_factory=SystemRandom)
    net: Net = field(default_factory=SystemNet)
