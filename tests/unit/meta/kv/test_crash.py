"""A process that acknowledges commits through a pipe is killed with SIGKILL at a random moment: what it acknowledged is there after reopening.

Small segments and small checkpoints, so that the kill also falls into both.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import trio

from kvfs.common.errors import DirectoryInUse
from kvfs.meta.kv import open_engine

CHILD = """
import sys
from itertools import count
import trio
import kvfs.meta.kv.lmdb_engine as module
from kvfs.common.boundary.real_disk import RealDisk

module.CHECKPOINT_COMMITS = 50

async def main(path):
    engine = module.LmdbEngine(RealDisk(path), segment_bytes=1 << 18)
    start = int(await engine.transact(lambda txn: txn.get(b"count")) or b"0")
    numbers = count(start + 1)

    async def client(width):
        for number in numbers:
            def work(txn, number=number):
                txn.set(b"n%08d" % number, b"%d" % number * 10)
                txn.clear(b"n%08d" % (number - 500))
                txn.set(b"count", b"%d" % max(number, int(txn.get(b"count") or b"0")))
            await engine.transact(work)
            sys.stdout.buffer.write(b"%d\\n" % number)
            sys.stdout.buffer.flush()

    async with trio.open_nursery() as nursery:
        for width in range(int(sys.argv[2])):
            nursery.start_soon(client, width)

trio.run(main, sys.argv[1])
"""


@pytest.mark.parametrize("clients", [1, 16])
def test_every_acknowledged_commit_survives_sigkill(tmp_path: Path, clients: int) -> None:
    seed = time.time_ns()
    print(f"seed {seed}")
    choose = random.Random(seed)
    path = tmp_path / "kv"
    path.mkdir()
    acknowledged: set[int] = set()
    for _ in range(4):
        child = subprocess.Popen([sys.executable, "-c", CHILD, str(path), str(clients)], stdout=subprocess.PIPE)
        assert child.stdout is not None
        first = child.stdout.readline()
        time.sleep(choose.uniform(0.05, 0.6))
        os.kill(child.pid, signal.SIGKILL)
        rest = child.stdout.read()
        child.wait()
        child.stdout.close()
        acknowledged.update(int(line) for line in (first + rest).split(b"\n")[:-1])

        async def check() -> None:
            engine = open_engine(f"lmdb:{path}")
            newest = int(await engine.transact(lambda txn: txn.get(b"count")) or b"0")
            assert newest >= max(acknowledged)
            for number in acknowledged:
                if number > newest - 400:
                    assert await engine.transact(lambda txn, number=number: txn.get(b"n%08d" % number)) == b"%d" % number * 10
            engine.close()

        trio.run(check)
    assert len(acknowledged) > 50


def test_another_process_cannot_open_the_directory(tmp_path: Path) -> None:
    path = tmp_path / "kv"
    path.mkdir()
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(path), "1"], stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None
        child.stdout.readline()
        with pytest.raises(DirectoryInUse, match=f"process {child.pid}"):
            open_engine(f"lmdb:{path}")
    finally:
        child.kill()
        child.wait()
        child.stdout.close()

    async def reopen() -> None:
        open_engine(f"lmdb:{path}").close()

    trio.run(reopen)
