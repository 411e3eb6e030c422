"""A whole cluster in one trio run, decided by one integer: managers with fail-over, metadata services, storage services and clients on simulated
machines, with virtual time, a simulated network and simulated disks, while faults strike. `make sim SEED=n` replays a seed with its trace.

Where things are: run.py (a seed from plan to verdict), many.py (many of them, and whether they prove anything), world.py (the cluster), machine.py
(one machine and its process, and how it dies), scheduler.py (virtual time and the order of tasks) over loop.py (trio, cheaper), store.py (the store
that several services share), workers.py (disk work without threads),
clients.py (a client machine), work.py (what clients were promised) with registers.py, append_log.py, files.py, blocks.py (what they do), faults.py,
stress.py with stress_works.py and stress_faults.py (every third seed), checks.py, blackout.py (power goes everywhere), trace.py. The product runs as
it is: services are given a `World` of boundaries, as they are given the real ones elsewhere, and configuration that users have too.

To write a fault: an `async def` in faults.py under `@fault(weight)`. It breaks something, sleeps, mends it; what it chooses, it draws from the
`random` it is given. To write a check: an `async def check_x(end) -> list[str]` in checks.py, added to CHECKS; it runs when every target serves
again and says what is wrong. To write a workload: a `Work` in a module of its own, added to WORKS in clients.py; what it was promised goes into the
`Record`.

To plant a fault in the product (tests/sim/planted.py does): replace the method that decides it before `run_seed(seed)` and put it back after; nothing
of a run is kept between seeds. A seed that fails prints its problems; its trace and every message: `python -m tests.sim --seed N --frames`.

A run must be a function of its seed: no `set` of objects or strings may decide an order, no real clock, no thread, no `id()`. test_sim.py runs seeds
under several hash seeds, in processes of their own, and compares the traces.
"""
