"""I/O rings: many reads or writes of many files prepared, submitted and waited for together. `Client.make_ring` makes one."""

from kvfs.client.rings.ring import Completion, IoRing

__all__ = ["Completion", "IoRing"]
