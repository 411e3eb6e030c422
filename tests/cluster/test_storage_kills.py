"""Three storage processes under SIGKILL, one, two or all at once, while clients write: nothing acknowledged is lost, nothing is
applied twice, no read goes back in time, the replicas end byte-identical. KVFS_KILLS (200 in the release run), KVFS_KILLS_SECONDS and
KVFS_KILLS_SEED make it longer and other."""

from __future__ import annotations

import os
import random
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import trio

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "storage"))
import mini_cluster
from test_recovery import Readers, Writers

SERVE = """
import sys, trio
from kvfs.storage.config import StorageConfig
from kvfs.storage.server import serve

async def main():
    async with trio.open_nursery() as nursery:
        await nursery.start(lambda task_status: serve(StorageConfig(**eval(sys.argv[1])), task_status=task_status))
        print("up", flush=True)

trio.run(main)
"""


class Processes(mini_cluster.MiniCluster):
    processes: dict[int, subprocess.Popen[str]]

    async def start(self, number: int, *, disks: int = 1) -> None:
        settings = {
            "data": (str(self.path / f"storage-{number}"),),
            "listen": ("tcp://127.0.0.1:0", f"unix://{self.path}/s{number}.sock"),
            "cluster_id": "test",
            "managers": (self.manager,),
            "threads": 2,
        }
        process = subprocess.Popen([sys.executable, "-c", SERVE, repr(settings)], stdout=subprocess.PIPE, text=True)
        self.processes[number] = process
        assert process.stdout is not None
        with trio.fail_after(30):
            assert await trio.to_thread.run_sync(process.stdout.readline, abandon_on_cancel=True) == "up\n"

    def kill(self, number: int) -> None:
        process = self.processes.pop(number)
        process.kill()
        process.wait()


KILLS = int(os.environ.get("KVFS_KILLS", "1"))


@pytest.mark.cluster
@pytest.mark.timeout(300 + 20 * KILLS)
def test_kills_under_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = float(os.environ.get("KVFS_KILLS_SECONDS", "15"))
    seed = int(os.environ.get("KVFS_KILLS_SEED", "1"))
    print(f"seed {seed}")
    chance = random.Random(seed)
    Processes.processes = {}
    monkeypatch.setattr(mini_cluster, "MiniCluster", Processes)

    async def main() -> None:
        async with mini_cluster.mini_cluster(tmp_path, lease_ms=1500) as world:
            assert isinstance(world, Processes)
            for number in (1, 2, 3):
                await world.start(number)
            await world.create(3, 3, targets_per_disk=2)
            chains = [chain.chain_id for chain in world.routing.chains]
            writers = [Writers(world, chain, 20, seed=seed + chain) for chain in chains]
            readers = [Readers(world, chain, 0, seed=seed + chain) for chain in chains]
            async with trio.open_nursery() as nursery:
                for reader in readers:
                    reader.start(nursery)
                for writer in writers:
                    for _ in range(3):
                        nursery.start_soon(writer.run)
                began_s = trio.current_time()
                kills, recovered_s = 0, []
                first = True
                while trio.current_time() < began_s + seconds or kills < KILLS:
                    await trio.sleep(chance.uniform(0.2, 1.5))
                    victims = [1, 2, 3] if first else chance.sample([1, 2, 3], chance.choice((1, 1, 2, 3)))
                    first = False
                    for victim in victims:
                        world.kill(victim)
                        kills += 1
                        await trio.sleep(chance.choice((0, 0.05, 0.5)))
                    await trio.sleep(chance.uniform(0, 2))
                    for victim in victims:
                        await world.start(victim)
                    if chance.random() < 0.7:
                        up_s = trio.current_time()
                        await world.settled(3, timeout_s=40)
                        recovered_s.append(trio.current_time() - up_s)
                await world.settled(3, timeout_s=60)
                updates = sum(writer.done for writer in writers)
                print(f"{kills} kills in {trio.current_time() - began_s:.0f} s, {updates} updates acknowledged; from the start of the killed")
                print(f"to all replicas serving: median {statistics.median(recovered_s or [0]):.1f} s, longest {max(recovered_s, default=0):.1f} s")
                for client in (*writers, *readers):
                    client.stopping = True
            for chain, writer in zip(chains, writers, strict=True):
                await writer.check()
                assert await world.assert_identical(chain) == len(writer.expected) + 1

    try:
        trio.run(main)
    finally:
        for process in Processes.processes.values():
            process.kill()
            process.wait()
