"""`kvfs cp`: files, directories and symbolic links into, out of and within the cluster.

As cp(1) does: permission bits go along (less the umask), `-p` takes owner and times too, `-r` copies directories, and symbolic links as links.
Must never: open a destination for writing that is the source itself, walk into what it is just making, wait on a FIFO, or go on after Ctrl-C.
"""

from __future__ import annotations

import os
import stat as stat_module
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import click
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from kvfs.cli.context import Options, common_options, err_console, print_json
from kvfs.cli.files import PREFIX, TYPE_BITS, TYPE_NAMES, cluster_path, connected, write_all
from kvfs.client import Client
from kvfs.common.errors import InvalidArgument, IsDirectory, NotDirectory
from kvfs.common.wire import meta_pb2

COPY_BYTES = 8 << 20
COPY_THREADS = 8
KINDS = {bits: TYPE_NAMES[number] for number, bits in TYPE_BITS.items()}


@dataclass(frozen=True, slots=True)
class Facts:
    """What a copy needs to know of a file. `identity`: equal for two names of one file on the same side."""

    kind: str
    identity: tuple[int, int]
    mode: int
    size: int
    uid: int
    gid: int
    atime_ns: int
    mtime_ns: int


class Tree:
    """One side of a copy: the local file system (no client) or the cluster, with the few operations that `cp` needs."""

    def __init__(self, client: Client | None) -> None:
        self.client = client

    def facts(self, path: str, *, follow: bool) -> Facts:
        if self.client is None:
            found = os.stat(path, follow_symlinks=follow)
            kind = KINDS.get(stat_module.S_IFMT(found.st_mode), "file")
            identity, mode = (found.st_dev, found.st_ino), stat_module.S_IMODE(found.st_mode)
            return Facts(kind, identity, mode, found.st_size, found.st_uid, found.st_gid, found.st_atime_ns, found.st_mtime_ns)
        return self._of(self.client.stat(path) if follow else self.client.lstat(path))

    def _of(self, inode: meta_pb2.Inode) -> Facts:
        kind = TYPE_NAMES.get(inode.type, "unknown")
        return Facts(kind, (0, inode.inode), inode.mode, inode.length, inode.uid, inode.gid, inode.atime_ns, inode.mtime_ns)

    def facts_or_none(self, path: str) -> Facts | None:
        """Links are followed; None: nothing there."""
        try:
            return self.facts(path, follow=True)
        except FileNotFoundError:
            return None

    def lies_in(self, path: str, directory: tuple[int, int]) -> bool:
        """Whether a path, as it is written, leads through a directory."""
        while (parent := os.path.dirname(path)) not in ("", path):
            path = parent
            found = self.facts_or_none(path)
            if found is not None and found.identity == directory:
                return True
        return False

    def entries(self, path: str) -> list[tuple[str, Facts]]:
        """A directory's entries; links are not followed."""
        if self.client is None:
            return [(name, self.facts(os.path.join(path, name), follow=False)) for name in sorted(os.listdir(path))]
        return [(name, self._of(inode)) for name, inode in self.client.scandir(path)]

    def mkdir(self, path: str, mode: int) -> None:
        os.mkdir(path, mode) if self.client is None else self.client.mkdir(path, mode)

    def open_to_read(self, path: str) -> Any:
        return open(path, "rb", buffering=0) if self.client is None else self.client.open(path, "rb", buffering=0)

    def open_to_write(self, path: str, mode: int) -> Any:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        if self.client is None:
            return os.fdopen(os.open(path, flags, mode), "wb", buffering=0)
        return self.client.open_raw(path, flags, mode)

    def readlink(self, path: str) -> str:
        return os.readlink(path) if self.client is None else self.client.readlink(path)

    def symlink(self, target: str, path: str) -> None:
        """In place of what has the name, unless that is a directory."""
        make = os.symlink if self.client is None else self.client.symlink
        try:
            make(target, path)
        except FileExistsError:
            os.unlink(path) if self.client is None else self.client.unlink(path)
            make(target, path)

    def set_mode(self, path: str, mode: int) -> None:
        os.chmod(path, mode) if self.client is None else self.client.chmod(path, mode)

    def set_owner_and_times(self, path: str, facts: Facts) -> None:
        """What the caller may not set is left, as cp -p does."""
        local = self.client is None
        try:
            os.lchown(path, facts.uid, facts.gid) if local else self.client.chown(path, facts.uid, facts.gid, follow=False)  # type: ignore[union-attr]
        except PermissionError:
            pass
        if local:
            os.utime(path, ns=(facts.atime_ns, facts.mtime_ns), follow_symlinks=False)
        else:
            self.client.utimens(path, facts.atime_ns, facts.mtime_ns, follow=False)  # type: ignore[union-attr]


@dataclass(slots=True)
class Item:
    source: Tree
    path: str
    facts: Facts
    target: str


@dataclass(slots=True)
class Plan:
    """What is to be copied. Directories are made while the plan is made; the rest follows."""

    to: Tree
    preserve: bool
    files: list[Item] = field(default_factory=list)
    links: list[Item] = field(default_factory=list)
    directories: list[Item] = field(default_factory=list)
    made: set[tuple[int, int]] = field(default_factory=set)

    def add(self, item: Item, *, same_side: bool, fresh: bool = False) -> None:
        """`same_side`: source and destination are one file system; `fresh`: the directory of the target was made a moment ago."""
        match item.facts.kind:
            case "directory":
                self.add_directory(item, same_side=same_side, fresh=fresh)
            case "file":
                there = None if fresh else self.to.facts_or_none(item.target)
                if there is not None and same_side and there.identity == item.facts.identity:
                    raise InvalidArgument(f"{item.path} and {item.target} are the same file")
                if there is not None and there.kind == "directory":
                    raise IsDirectory(f"{item.target} is a directory, {item.path} is none")
                self.files.append(item)
            case "symlink":
                self.links.append(item)
            case kind:
                err_console.print(f"kvfs: {item.path} is a {kind}: left out", style="yellow")

    def add_directory(self, item: Item, *, same_side: bool, fresh: bool) -> None:
        if same_side and item.facts.identity in self.made:
            raise InvalidArgument(f"{item.path} is being made by this copy: a directory cannot be copied into itself")
        entries = item.source.entries(item.path)
        there = None if fresh else self.to.facts_or_none(item.target)
        made = there is None
        if there is None:
            self.to.mkdir(item.target, (item.facts.mode & 0o777) | 0o700)
            there = self.to.facts(item.target, follow=True)
            self.directories.append(item)
        elif there.kind != "directory":
            raise NotDirectory(f"{item.target} is not a directory, {item.path} is one")
        elif same_side and there.identity == item.facts.identity:
            raise InvalidArgument(f"{item.path} and {item.target} are the same directory")
        self.made.add(there.identity)
        for name, facts in entries:
            self.add(Item(item.source, os.path.join(item.path, name), facts, os.path.join(item.target, name)), same_side=same_side, fresh=made)

    def run(self, advance: Callable[[int, int], None]) -> None:
        stop = threading.Event()
        with ThreadPoolExecutor(COPY_THREADS) as threads:
            try:
                for done in [threads.submit(self.copy_file, item, advance, stop) for item in self.files]:
                    done.result()
            except BaseException:
                stop.set()
                threads.shutdown(wait=False, cancel_futures=True)
                raise
        for item in self.links:
            self.to.symlink(item.source.readlink(item.path), item.target)
            if self.preserve:
                self.to.set_owner_and_times(item.target, item.facts)
        umask = os.umask(0o022)
        os.umask(umask)
        for item in reversed(self.directories):  # last, deepest first: a copy into a directory changes its times, and it may not be writable
            mode = item.facts.mode if self.preserve else item.facts.mode & 0o1777 & ~umask
            if self.preserve:
                self.to.set_owner_and_times(item.target, item.facts)
            self.to.set_mode(item.target, mode)

    def copy_file(self, item: Item, advance: Callable[[int, int], None], stop: threading.Event) -> None:
        """One file's bytes; a short one needs one buffer of its own size only."""
        with item.source.open_to_read(item.path) as reader, self.to.open_to_write(item.target, item.facts.mode & 0o777) as writer:
            buffer = memoryview(bytearray(min(COPY_BYTES, max(4096, item.facts.size))))
            while not stop.is_set() and (count := reader.readinto(buffer)):
                write_all(writer, buffer[:count])
                advance(count, 0)
        if self.preserve:
            self.to.set_owner_and_times(item.target, item.facts)
            self.to.set_mode(item.target, item.facts.mode)  # after the owner: a change of owner clears setuid
        advance(0, 1)


def side(client: Client, text: str) -> tuple[Tree, str]:
    return (Tree(client), cluster_path(text)) if text.startswith(PREFIX) else (Tree(None), text)


@click.command()
@click.argument("sources", nargs=-1, required=True)
@click.argument("destination")
@click.option("-r", "-R", "--recursive", is_flag=True, help="Copy directories with all that is in them, and symbolic links as links.")
@click.option("-p", "--preserve", is_flag=True, help="Keep owner, all mode bits and times; without it, permission bits less the umask.")
@common_options
def cp(options: Options, sources: tuple[str, ...], destination: str, recursive: bool, preserve: bool) -> None:
    """Copy SOURCES to DESTINATION; `kvfs:/path` means the cluster, anything else this machine's files."""
    if not any(text.startswith(PREFIX) for text in (*sources, destination)):
        raise InvalidArgument("no path names the cluster: write kvfs:/path for what lies in it")
    with connected(options) as client:
        to, to_path = side(client, destination)
        plan = Plan(to, preserve)
        there = to.facts_or_none(to_path)
        into = there is not None and there.kind == "directory"
        if not into and len(sources) > 1:
            raise NotDirectory(f"{destination} is not a directory: several sources need one")
        for text in sources:
            source, path = side(client, text)
            facts = source.facts(path, follow=not recursive)
            if facts.kind == "directory" and not recursive:
                raise IsDirectory(f"{text} is a directory: use -r to copy it with all that is in it")
            if facts.kind not in ("file", "directory", "symlink"):
                raise InvalidArgument(f"{text} is a {facts.kind}: only files, directories and symbolic links are copied")
            if destination.endswith("/") and facts.kind != "directory" and not into:
                raise NotDirectory(f"{destination} is not a directory: make it first (kvfs mkdir)")
            target = os.path.join(to_path, os.path.basename(path.rstrip("/"))) if into else to_path
            same_side = source.client is to.client
            if same_side and facts.kind == "directory" and to.lies_in(target, facts.identity):
                raise InvalidArgument(f"{text} cannot be copied into itself ({target})")
            plan.add(Item(source, path, facts, target), same_side=same_side)
        total = sum(item.facts.size for item in plan.files)
        with progress_bar(total, len(plan.files), quiet=options.as_json) as advance:
            plan.run(advance)
    if options.as_json:
        print_json({"files": len(plan.files), "directories": len(plan.directories), "links": len(plan.links), "bytes": total})


@contextmanager
def progress_bar(total_bytes: int, total_files: int, *, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """Yields advance(bytes, files). Nothing is drawn when nobody watches."""
    if quiet or not err_console.is_terminal:
        yield lambda count, files: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err_console) as bytes_bar:
        task = bytes_bar.add_task("copying", total=total_bytes)
        done_files = 0

        def advance(count: int, files: int) -> None:
            nonlocal done_files
            done_files += files
            bytes_bar.update(task, advance=count, description=f"copying {done_files}/{total_files} files")

        yield advance
