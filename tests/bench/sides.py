"""The file systems that are compared: local disk, mount, native client. One small interface, so that every workload is the same code on each."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Protocol

from kvfs.client import Client


class Side(Protocol):
    """Paths are relative to the side's own test folder."""

    name: str

    def open(self, path: str, mode: str) -> Any:
        """A raw (unbuffered) binary file with readinto, write, seek and close."""

    def pread(self, file: Any, view: memoryview, offset: int) -> int: ...

    def mkdir(self, path: str) -> None: ...

    def stat(self, path: str) -> object: ...

    def unlink(self, path: str) -> None: ...

    def listdir(self, path: str) -> list[str]: ...

    def close(self) -> None: ...


class PosixSide:
    """The local disk, or the mount."""

    def __init__(self, name: str, root: Path) -> None:
        self.name, self.root = name, str(root)

    def open(self, path: str, mode: str) -> Any:
        return open(f"{self.root}/{path}", mode, buffering=0)

    def pread(self, file: Any, view: memoryview, offset: int) -> int:
        return os.preadv(file.fileno(), [view], offset)

    def mkdir(self, path: str) -> None:
        os.makedirs(f"{self.root}/{path}", exist_ok=True)

    def stat(self, path: str) -> object:
        return os.stat(f"{self.root}/{path}")

    def unlink(self, path: str) -> None:
        os.unlink(f"{self.root}/{path}")

    def listdir(self, path: str) -> list[str]:
        return os.listdir(f"{self.root}/{path}")

    def close(self) -> None:
        pass


class NativeSide:
    """The native client's synchronous face."""

    name = "native"

    def __init__(self, cluster: str) -> None:
        self.client = Client(cluster, description="bench")
        self.client.stat("/")  # connected, as the mount is: connecting is no part of any workload

    def open(self, path: str, mode: str) -> Any:
        return self.client.open(f"/{path}", mode, buffering=0)

    def pread(self, file: Any, view: memoryview, offset: int) -> int:
        return int(file.preadv([view], offset))

    def mkdir(self, path: str) -> None:
        self.client.makedirs(f"/{path}", exist_ok=True)

    def stat(self, path: str) -> object:
        return self.client.stat(f"/{path}")

    def unlink(self, path: str) -> None:
        self.client.unlink(f"/{path}")

    def listdir(self, path: str) -> list[str]:
        return self.client.listdir(f"/{path}")

    def close(self) -> None:
        self.client.close()


def make(kind: str, where: str) -> Side:
    return NativeSide(where) if kind == "native" else PosixSide(kind, Path(where))
