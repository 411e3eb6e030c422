"""The retention log: what a restart knows again, after a clean stop, a crash at every write, a torn tail, damage."""

from __future__ import annotations

import random

import pytest
from engine_world import LogDisk, ManualClock, cid, open_engine, write
from tests.unit.document import worked_bytes

from kvfs.common.checksum import xxh3_64
from kvfs.common.errors import FormatTooNew
from kvfs.common.ids import SPACE_BIT, block_id
from kvfs.common.wire import storage_pb2 as pb
from kvfs.storage.engine.engine import ChunkEngine
from kvfs.storage.retention import records
from kvfs.storage.retention.log import NAME
from kvfs.storage.retention.retention import Retention
from kvfs.storage.retention.table import Counts, Policy

INODE = SPACE_BIT | 3
OTHER = SPACE_BIT | 4


def digest(number: int) -> bytes:
    return number.to_bytes(16, "big")


class Life:
    """A target from its opening to its end."""

    def __init__(self, disk: LogDisk, clock: ManualClock) -> None:
        self.clock = clock
        self.engine: ChunkEngine = open_engine(disk, clock=clock)
        self.retention = Retention(clock, self.engine)
        self.retention.load()

    def create(self, number: int, inode: int = INODE) -> None:
        self.clock.now += 0.01
        name = block_id(inode, digest(number))
        self.engine.apply(write(name, 0, b"x" * 100, slab_bytes=4096), 1)
        self.retention.settled(name, 0, at_head=True)

    def remove(self, number: int) -> None:
        self.engine.remove([block_id(INODE, digest(number))])
        self.retention.settled(block_id(INODE, digest(number)), 0, at_head=True)

    def touch(self, *numbers: int, inode: int = INODE) -> None:
        self.clock.now += 0.01
        self.retention.touch(inode, b"".join(map(digest, numbers)))

    def flush(self) -> None:
        work = self.retention.write_log(self.retention.take_news())
        if work is not None:
            work()

    def order(self, inode: int = INODE) -> list[int]:
        return [int.from_bytes(name, "big") for name in self.retention.tables[inode].digests(1000)] if inode in self.retention.tables else []

    def stop(self) -> None:
        self.flush()
        self.retention.close()
        self.engine.close()


def test_tables_are_as_before_after_a_restart() -> None:
    disk, clock = LogDisk(), ManualClock()
    life = Life(disk, clock)
    life.retention.learn(pb.KvSpace(inode=INODE, block_bytes=4000, quota_bytes=90_000, ttl_ms=777, version=3))
    for number in range(8):
        life.create(number)
    life.create(5, OTHER)
    life.touch(6, 2, 1)
    life.flush()
    life.remove(3)
    life.touch(4, 0)
    life.create(9)
    life.touch(1)
    assert life.retention.probe(INODE, digest(1) + digest(50), touch=False) == [True, False]
    order, times = life.order(), life.retention.tables[INODE].order()
    assert order == [5, 7, 6, 2, 4, 0, 9, 1]
    counts = life.retention.tables[INODE].counts
    life.stop()
    clock.now += 100
    again = Life(disk, clock)
    assert again.order() == order and again.order(OTHER) == [5]
    assert again.retention.tables[INODE].order() == times
    assert again.retention.tables[INODE].counts == counts and (counts.stored, counts.removed, counts.hits, counts.misses) == (9, 1, 1, 1)
    table = again.retention.tables[INODE]
    assert (table.policy.quota_bytes, table.policy.ttl_ms, table.policy.version, table.slab_bytes) == (90_000, 777, 3, 4096)
    assert (len(table), table.bytes) == (8, 800)


def test_chunks_of_files_are_no_blocks() -> None:
    disk, clock = LogDisk(), ManualClock()
    life = Life(disk, clock)
    life.engine.apply(write(cid(1, inode=SPACE_BIT - 1), 0, b"file"), 1)
    life.create(1)
    life.stop()
    assert list(Life(disk, clock).retention.tables) == [INODE]


def scripted(seed: int) -> tuple[LogDisk, list[tuple[int, list[int]]]]:
    """A history, and for every point of the disk's log after which something had been flushed: the order then."""
    dice = random.Random(seed)
    disk, clock = LogDisk(), ManualClock()
    Life(disk, clock).stop()
    disk.start_log()
    life = Life(disk, clock)
    flushed: list[tuple[int, list[int]]] = []
    for _ in range(60):
        what = dice.randrange(6)
        if what == 0:
            life.create(dice.randrange(100))
        elif what == 1 and life.order():
            life.remove(dice.choice(life.order()))
        elif what == 2:
            life.flush()
            flushed.append((len(disk.log), life.order()))
        elif life.order():
            life.touch(*dice.choices(life.order(), k=3))
    return disk, flushed


@pytest.mark.parametrize("seed", range(4))
def test_killed_at_every_point(seed: int) -> None:
    disk, flushed = scripted(seed)
    for point in range(len(disk.log) + 1):
        left = disk.after_kill(point)
        life = Life(left, later())
        for end, order in flushed:
            if end == point:
                assert life.order() == order, f"seed {seed}, killed after entry {point}, right after a flush"
        check(life)


@pytest.mark.parametrize("seed", range(10, 14))
def test_power_loss_at_every_point(seed: int) -> None:
    disk, _ = scripted(seed)
    for point in range(len(disk.log) + 1):
        check(Life(disk.after_power_loss(point, random.Random(seed * 1000 + point)), later()))


def later() -> ManualClock:
    clock = ManualClock()
    clock.now += 1000
    return clock


def check(life: Life) -> None:
    """The tables are what the index says, and the target is of use."""
    metas, _ = life.engine.list(limit=1000)
    assert sorted(life.order()) == sorted(int.from_bytes(meta.chunk_id[8:], "big") for meta in metas if meta.version)
    life.create(500)
    life.touch(500)
    life.flush()
    order = life.order()
    again = Life(life.engine.disk.copy(), life.clock)  # type: ignore[attr-defined]
    assert again.order() == order and order[-1] == 500


def lived() -> tuple[LogDisk, ManualClock, list[int]]:
    disk, clock = LogDisk(), ManualClock()
    life = Life(disk, clock)
    for number in range(6):
        life.create(number)
    life.flush()
    life.touch(3, 2, 1)
    life.flush()
    life.touch(5)
    life.flush()
    order = life.order()
    life.stop()
    return disk, clock, order


def test_a_torn_tail_is_left_out_and_written_over() -> None:
    disk, clock, order = lived()
    whole = bytes(disk.files[NAME].data)
    for cut in (1, 20, 47):
        torn = disk.copy()
        del torn.files[NAME].data[-cut:]
        life = Life(torn, clock)
        assert life.order() == [0, 4, 5, 3, 2, 1], "all but the last touch"
        life.touch(5)
        life.stop()
        assert Life(torn, clock).order() == order
        assert len(torn.files[NAME].data) == len(whole)


@pytest.mark.parametrize("place", ["header", "first", "middle"])
def test_damage_is_told_and_the_rest_recovered(place: str, caplog: pytest.LogCaptureFixture) -> None:
    disk, clock, _ = lived()
    data = disk.files[NAME].data
    starts = [at for at in range(len(data)) if data[at : at + 4] == b"KVRT"]
    data[{"header": 3, "first": starts[0] + 30, "middle": starts[1] + 45}[place]] ^= 0x40
    found = records.replay(bytes(data))
    assert found.problem is not None and found.problem.code == 502
    life = Life(disk, clock)
    assert "retention log" in caplog.text
    assert sorted(life.order()) == list(range(6)), "every block of the index is there"
    assert life.order()[-1] == 5, "later records count"
    order = life.order()
    life.stop()
    caplog.clear()
    assert Life(disk, clock).order() == order and not caplog.text, "it was written anew"


def test_a_clock_that_was_set_back_keeps_the_order() -> None:
    disk, clock, order = lived()
    clock.now -= 500
    life = Life(disk, clock)
    assert life.order()[-4:] == order[-4:], "what the log knows"
    assert max(at for _, at in life.retention.tables[INODE].order()) <= clock.now * 1000
    life.touch(0)
    order = life.order()
    life.stop()
    assert order[-1] == 0 and Life(disk, clock).order() == order


def test_without_a_log_the_order_is_that_of_writing() -> None:
    disk, clock, _ = lived()
    del disk.files[NAME]
    life = Life(disk, clock)
    assert life.order() == [0, 1, 2, 3, 4, 5]
    life.touch(0)
    life.stop()
    assert Life(disk, clock).order() == [1, 2, 3, 4, 5, 0]


def test_a_log_of_a_newer_version_is_left_alone() -> None:
    disk, clock, _ = lived()
    data = disk.files[NAME].data
    data[8] = 2
    data[12:16] = (xxh3_64(bytes(data[:12])) & 0xFFFFFFFF).to_bytes(4, "little")
    before = bytes(disk.files[NAME].data)
    with pytest.raises(FormatTooNew):
        Life(disk, clock)
    assert bytes(disk.files[NAME].data) == before


def test_the_log_is_written_anew_when_most_of_it_is_past(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvfs.storage.retention.log._LEAST_BYTES", 2000)
    disk, clock = LogDisk(), ManualClock()
    life = Life(disk, clock)
    for number in range(10):
        life.create(number)
    longest = 0
    for round_ in range(200):
        life.touch(*[(round_ * 7 + step) % 10 for step in range(5)])
        life.flush()
        longest = max(longest, len(disk.files[NAME].data))
    assert longest < 2500
    order = life.order()
    life.stop()
    assert Life(disk, clock).order() == order


def test_spaces_without_blocks_are_forgotten_when_they_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvfs.storage.retention.retention.SPACES_MAX", 3)
    disk, clock = LogDisk(), ManualClock()
    life = Life(disk, clock)
    life.create(1)
    for number in range(10, 20):
        life.retention.learn(pb.KvSpace(inode=SPACE_BIT | number, block_bytes=4000, version=1))
        life.flush()
    assert list(life.retention.tables) == [INODE, SPACE_BIT | 18, SPACE_BIT | 19]
    life.stop()
    assert sorted(Life(disk, clock).retention.tables) == [INODE, SPACE_BIT | 18, SPACE_BIT | 19]


def test_the_log_of_the_document() -> None:
    example = worked_bytes("retention")
    policy, counts = Policy(4_497_408, 1 << 30, 3_600_000, 2), Counts(10, 4, 9, 1, 2, 3, 0)
    blocks = [(bytes(range(16)), 1_700_000_000_000), (bytes(range(16, 32)), 1_700_000_000_000)]
    inode = SPACE_BIT | 42
    assert records.snapshot({inode: (policy, counts.values(), blocks)}) == example
    found = records.replay(example)
    assert (found.end, found.problem) == (len(example), None)
    told = found.spaces[inode]
    assert (told.policy, told.counts, list(told.touched.items())) == (policy, counts, blocks)
