"""A random-I/O verifier in the manner of fsx: one file, a model of it in memory, and operations through many handles in several processes.

Every read is compared with the model at once; when the file moves to the next directory (another mount of the same cluster) all handles are
closed and
the whole content is compared there. A failure tells the seed and the last operations. Run as a program on one or more directories:

    python -m tests.mount.random_io --operations 1000000 --seed 7 /mnt/one/d /mnt/two/d
"""

from __future__ import annotations

import argparse
import mmap
import os
import random
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from tests.mount.agent import Agent

MIB = 1 << 20
FILE_BYTES_MAX = 5 * MIB
IO_BYTES_MAX = 200 * 1024
HISTORY = 40


class Caller(Protocol):
    """Makes the system calls: this process, or an agent."""

    def open(self, path: str, flags: int) -> int: ...
    def close(self, fd: int) -> None: ...
    def pread(self, fd: int, length: int, offset: int) -> bytes: ...
    def pwrite(self, fd: int, data: bytes, offset: int) -> int: ...
    def write(self, fd: int, data: bytes) -> int: ...
    def ftruncate(self, fd: int, length: int) -> None: ...
    def fsync(self, fd: int) -> None: ...


class Here:
    open = staticmethod(os.open)
    close = staticmethod(os.close)
    pread = staticmethod(os.pread)
    pwrite = staticmethod(os.pwrite)
    write = staticmethod(os.write)
    ftruncate = staticmethod(os.ftruncate)
    fsync = staticmethod(os.fsync)


class There:
    def __init__(self, agent: Agent) -> None:
        for name in ("open", "pread", "pwrite", "write", "ftruncate", "fsync", "close"):
            setattr(self, name, getattr(agent, name))


@dataclass(slots=True)
class Handle:
    caller: Caller
    fd: int
    append: bool
    blind: bool = False
    """Open for writing only."""
    mapping: mmap.mmap | None = None


@dataclass
class Verifier:
    directories: list[Path]
    seed: int
    agents: list[Agent] = field(default_factory=list)
    handles_max: int = 6

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.model = bytearray()
        self.at = 0
        self.handles: list[Handle] = []
        self.history: deque[str] = deque(maxlen=HISTORY)
        self.counts: Counter[str] = Counter()
        self.callers: list[Caller] = [Here(), Here(), Here(), *(There(agent) for agent in self.agents)]  # type: ignore[list-item]
        self.noise = self.random.randbytes(MIB)

    @property
    def path(self) -> str:
        return str(self.directories[self.at] / "random-io")

    def run(self, operations: int, *, seconds: float = 0.0) -> None:
        os.close(os.open(self.path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o666))
        os.chmod(self.path, 0o666)
        weighted: list[tuple[Callable[[], str], float]] = [
            (self.write, 38), (self.read, 38), (self.map_read, 8), (self.truncate, 2.5), (self.append, 1.5), (self.stat, 5),
            (self.fsync, 0.5), (self.reopen, 3), (self.write_far, 1.5), (self.switch, 0.2), (self.truncate_path, 0.5),
        ]  # fmt: skip
        chosen = [call for call, _ in weighted]
        weights = [weight for _, weight in weighted]
        end = time.monotonic() + seconds if seconds else None
        try:
            for _ in range(operations):
                call = self.random.choices(chosen, weights)[0]
                self.history.append(call())
                self.counts[call.__name__] += 1
                if end and time.monotonic() > end:
                    break
            self.switch()
        except (AssertionError, OSError) as error:
            story = "\n  ".join(self.history)
            raise AssertionError(f"seed {self.seed}, {sum(self.counts.values())} operations in: {error}\nbefore it:\n  {story}") from error
        finally:
            self.close_all()

    # --- helpers ---

    def handle(self) -> Handle:
        if len(self.handles) < 2 or (len(self.handles) < self.handles_max and self.random.random() < 0.05):
            caller = self.random.choice(self.callers)
            append, blind = self.random.random() < 0.15, self.random.random() < 0.2
            fd = caller.open(self.path, (os.O_WRONLY if blind else os.O_RDWR) | (os.O_APPEND if append else 0))
            self.handles.append(Handle(caller, fd, append, blind))
        return self.random.choice(self.handles)

    def plain(self) -> Handle:
        for _ in range(100):
            handle = self.handle()
            if not handle.append:
                return handle
        self.close_all()
        return self.plain()

    def seeing(self) -> Handle:
        for _ in range(100):
            handle = self.handle()
            if not handle.blind:
                return handle
        self.close_all()
        return self.seeing()

    def close(self, handle: Handle) -> None:
        if handle.mapping is not None:
            handle.mapping.close()
        handle.caller.close(handle.fd)
        self.handles.remove(handle)

    def close_all(self) -> None:
        for handle in list(self.handles):
            self.close(handle)

    def data(self, length: int) -> bytes:
        start = self.random.randrange(len(self.noise) - length)
        return self.noise[start : start + length]

    def length(self) -> int:
        return int(self.random.choice((1, 13, 512, 4096, 4096, 32768, IO_BYTES_MAX)) * self.random.random()) + 1

    def offset(self) -> int:
        top = len(self.model)
        kind = self.random.random()
        if kind < 0.2 and top:
            return self.random.randrange(top + 1) & ~4095
        if kind < 0.3:
            return max(0, (self.random.randrange(top // MIB + 1) * MIB) - self.random.randrange(3000))
        return self.random.randrange(top + 1)

    def check(self, got: bytes | memoryview, offset: int, what: str) -> None:
        expected = bytes(self.model[offset : offset + len(got)])
        if bytes(got) != expected:
            wrong = (
                next(i for i, (a, b) in enumerate(zip(bytes(got), expected, strict=False)) if a != b) if len(expected) == len(got) else len(expected)
            )
            raise AssertionError(
                f"{what} at {offset} (+{len(got)}), file of {len(self.model)}: byte {offset + wrong} is {bytes(got)[wrong : wrong + 8].hex()}, "
                f"should be {expected[wrong : wrong + 8].hex()}"
            )

    # --- operations ---

    def put(self, offset: int, data: bytes) -> None:
        if offset > len(self.model):
            self.model.extend(bytes(offset - len(self.model)))
        self.model[offset : offset + len(data)] = data

    def write(self) -> str:
        handle, offset = self.plain(), self.offset()
        data = self.data(min(self.length(), FILE_BYTES_MAX - offset) or 1)
        assert handle.caller.pwrite(handle.fd, data, offset) == len(data)
        self.put(offset, data)
        return f"write {offset} +{len(data)} fd {handle.fd}"

    def write_far(self) -> str:
        """Behind the end: a hole."""
        handle = self.plain()
        offset = min(FILE_BYTES_MAX - 1000, len(self.model) + self.random.randrange(2 * MIB))
        data = self.data(self.random.randrange(1, 1000))
        assert handle.caller.pwrite(handle.fd, data, offset) == len(data)
        self.put(offset, data)
        return f"write far {offset} +{len(data)} fd {handle.fd}"

    def append(self) -> str:
        handle = next((handle for handle in self.handles if handle.append), None) or self.handle()
        if not handle.append or len(self.model) > FILE_BYTES_MAX - IO_BYTES_MAX:
            return self.read()
        data = self.data(self.length())
        assert handle.caller.write(handle.fd, data) == len(data)
        self.model += data
        return f"append +{len(data)} fd {handle.fd}"

    def read(self) -> str:
        handle, offset, length = self.seeing(), self.offset(), self.length()
        got = handle.caller.pread(handle.fd, length, offset)
        expected = max(0, min(length, len(self.model) - offset))
        assert len(got) == expected, f"read of {length} at {offset} gave {len(got)} bytes, should be {expected} (file of {len(self.model)})"
        self.check(got, offset, "read")
        return f"read {offset} +{length} fd {handle.fd}"

    def map_read(self) -> str:
        handle = next((handle for handle in self.handles if isinstance(handle.caller, Here) and not handle.blind and not handle.append), None)
        if handle is None or not self.model:
            return self.read()
        if handle.mapping is None or len(handle.mapping) > len(self.model) or self.random.random() < 0.3:
            if handle.mapping is not None:
                handle.mapping.close()
            handle.mapping = mmap.mmap(handle.fd, len(self.model), mmap.MAP_SHARED, mmap.PROT_READ)
        top = min(len(handle.mapping), len(self.model))
        offset = self.random.randrange(top)
        length = min(self.length(), top - offset)
        self.check(handle.mapping[offset : offset + length], offset, "mapped read")
        return f"mapped read {offset} +{length} fd {handle.fd}"

    def resize(self, length: int) -> None:
        if length < len(self.model):
            del self.model[length:]
        else:
            self.model.extend(bytes(length - len(self.model)))
        for handle in self.handles:  # a mapping behind the end would be a bus error, which is right and of no use
            if handle.mapping is not None and len(handle.mapping) > length:
                handle.mapping.close()
                handle.mapping = None

    def new_length(self) -> int:
        return self.random.randrange(min(FILE_BYTES_MAX, 2 * len(self.model) + 5000))

    def truncate(self) -> str:
        handle, length = self.plain(), self.new_length()
        before = len(self.model)
        self.resize(length)
        handle.caller.ftruncate(handle.fd, length)
        return f"ftruncate {before} -> {length} fd {handle.fd}"

    def truncate_path(self) -> str:
        length = self.new_length()
        before = len(self.model)
        self.resize(length)
        os.truncate(self.path, length)
        return f"truncate {before} -> {length}"

    def stat(self) -> str:
        found = os.stat(self.path).st_size
        assert found == len(self.model), f"stat says {found} bytes, should be {len(self.model)}"
        return "stat"

    def fsync(self) -> str:
        handle = self.handle()
        handle.caller.fsync(handle.fd)
        return f"fsync fd {handle.fd}"

    def reopen(self) -> str:
        if not self.handles:
            return self.read()
        handle = self.random.choice(self.handles)
        fd = handle.fd
        self.close(handle)
        return f"close fd {fd}"

    def switch(self) -> str:
        """Close everywhere; the next directory (another mount) must show every byte."""
        self.close_all()
        self.at = (self.at + 1) % len(self.directories)
        with open(self.path, "rb") as file:
            got = file.read()
        assert len(got) == len(self.model), f"{self.path} has {len(got)} bytes, should have {len(self.model)}"
        self.check(got, 0, "whole file")
        return f"switch to {self.path}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Random I/O on one file, verified against a model in memory.")
    parser.add_argument("directories", nargs="+", type=Path, help="the same directory, through one or more mounts")
    parser.add_argument("--operations", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4), "big"))
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    agents = [Agent(), Agent()]
    verifier = Verifier(options.directories, options.seed, agents)
    started = time.monotonic()
    try:
        verifier.run(options.operations)
    finally:
        for agent in agents:
            agent.stop()
    print(f"{sum(verifier.counts.values())} operations in {time.monotonic() - started:.0f} s: {dict(verifier.counts)}")


if __name__ == "__main__":
    main()
