"""`kvfs ls`, `cp`, `cat`, `rm`, `mkdir`, `stat`: files through the native client, no mount needed. Paths of the cluster may carry a `kvfs:` prefix;
`cp` needs it, to tell them from local ones."""

from __future__ import annotations

import os
import shutil
import stat as stat_module
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import Any

import click
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from kvfs.cli.context import Options, common_options, console, err_console, human_bytes, print_json, table
from kvfs.client import Client
from kvfs.common.errors import InvalidArgument, IsDirectory, NotDirectory, NotEmpty
from kvfs.common.wire import meta_pb2

PREFIX = "kvfs:"
COPY_BYTES = 8 << 20
COPY_THREADS = 8
TYPE_NAMES = {
    meta_pb2.FILE: "file",
    meta_pb2.DIRECTORY: "directory",
    meta_pb2.SYMLINK: "symlink",
    meta_pb2.FIFO: "fifo",
    meta_pb2.SOCKET: "socket",
    meta_pb2.CHAR_DEVICE: "char-device",
    meta_pb2.BLOCK_DEVICE: "block-device",
}
TYPE_BITS = {
    meta_pb2.FILE: stat_module.S_IFREG,
    meta_pb2.DIRECTORY: stat_module.S_IFDIR,
    meta_pb2.SYMLINK: stat_module.S_IFLNK,
    meta_pb2.FIFO: stat_module.S_IFIFO,
    meta_pb2.SOCKET: stat_module.S_IFSOCK,
    meta_pb2.CHAR_DEVICE: stat_module.S_IFCHR,
    meta_pb2.BLOCK_DEVICE: stat_module.S_IFBLK,
}


@contextmanager
def connected(options: Options) -> Iterator[Client]:
    with Client(options.cluster_spec(), description="kvfs command") as client:
        yield client


def cluster_path(text: str) -> str:
    """`kvfs:/a/b`, `kvfs:///a/b`, `/a/b` or `a/b` as an absolute path in the cluster."""
    if text.startswith(PREFIX):
        text = text.removeprefix(PREFIX)
        text = text.removeprefix("//")
    return "/" + text.strip("/")


def describe(path: str, inode: meta_pb2.Inode) -> dict[str, Any]:
    found: dict[str, Any] = {
        "path": path,
        "type": TYPE_NAMES.get(inode.type, "unknown"),
        "inode": inode.inode,
        "mode": f"{inode.mode:04o}",
        "uid": inode.uid,
        "gid": inode.gid,
        "nlink": inode.nlink,
        "length": inode.length,
        "atime_ns": inode.atime_ns,
        "mtime_ns": inode.mtime_ns,
        "ctime_ns": inode.ctime_ns,
    }
    if inode.type == meta_pb2.SYMLINK:
        found["target"] = os.fsdecode(inode.symlink)
    if inode.type in (meta_pb2.FILE, meta_pb2.DIRECTORY):
        layout = inode.layout
        found["layout"] = {"table": layout.table_id, "chunk_size": layout.chunk_size, "stripe": layout.stripe, "chains": list(layout.chain_ids)}
    return found


@click.command()
@click.argument("paths", nargs=-1)
@click.option("-l", "long", is_flag=True, help="Modes, owners, sizes, times.")
@common_options
def ls(options: Options, paths: tuple[str, ...], long: bool) -> None:
    """List directories (default: the root)."""
    with connected(options) as client:
        rows: list[dict[str, Any]] = []
        for path in map(cluster_path, paths or ("/",)):
            inode = client.stat(path)
            if inode.type != meta_pb2.DIRECTORY:
                rows.append(describe(path, inode))
                continue
            rows += [describe(str(PurePosixPath(path) / name), attributes) for name, attributes in sorted(client.scandir(path))]
    if options.as_json:
        print_json(rows)
    elif long:
        made = table("mode", "links", "uid", "gid", "size", "modified", "name", right=("links", "uid", "gid", "size"))
        for row in rows:
            bits = next(bits for kind, bits in TYPE_BITS.items() if TYPE_NAMES[kind] == row["type"])
            when = time.strftime("%Y-%m-%d %H:%M", time.localtime(row["mtime_ns"] / 1e9))
            name = os.path.basename(row["path"]) + (f" -> {row['target']}" if "target" in row else "")
            made.add_row(
                stat_module.filemode(bits | int(row["mode"], 8)), str(row["nlink"]), str(row["uid"]), str(row["gid"]), str(row["length"]), when, name
            )
        console.print(made)
    else:
        for row in rows:
            click.echo(os.path.basename(row["path"]) + ("/" if row["type"] == "directory" else ""))


@click.command()
@click.argument("paths", nargs=-1, required=True)
@common_options
def stat(options: Options, paths: tuple[str, ...]) -> None:
    """Attributes and layout of PATHS (symbolic links are not followed)."""
    with connected(options) as client:
        rows = [describe(path, client.lstat(path)) for path in map(cluster_path, paths)]
    if options.as_json:
        print_json(rows)
        return
    for row in rows:
        made = table("", "")
        for key, value in row.items():
            made.add_row(key, human_bytes(value) + f" ({value})" if key == "length" and value > 1024 else str(value))
        console.print(made)


@click.command()
@click.argument("paths", nargs=-1, required=True)
@common_options
def cat(options: Options, paths: tuple[str, ...]) -> None:
    """Print files to standard output."""
    with connected(options) as client:
        for path in map(cluster_path, paths):
            with client.open(path, "rb", buffering=0) as source:
                shutil.copyfileobj(source, sys.stdout.buffer, COPY_BYTES)
    sys.stdout.buffer.flush()


@click.command()
@click.argument("paths", nargs=-1, required=True)
@click.option("-p", "--parents", is_flag=True, help="Make parents too; an existing directory is no error.")
@common_options
def mkdir(options: Options, paths: tuple[str, ...], parents: bool) -> None:
    """Make directories."""
    with connected(options) as client:
        for path in map(cluster_path, paths):
            client.makedirs(path, exist_ok=True) if parents else client.mkdir(path)
    if options.as_json:
        print_json({"made": [cluster_path(path) for path in paths]})


@click.command()
@click.argument("paths", nargs=-1, required=True)
@click.option("-r", "--recursive", is_flag=True, help="Directories with all that is in them: gone at once, space comes back in the background.")
@click.option("-f", "--force", is_flag=True, help="A path that is not there is no error.")
@common_options
def rm(options: Options, paths: tuple[str, ...], recursive: bool, force: bool) -> None:
    """Remove files, and with -r directories."""
    removed = []
    with connected(options) as client:
        for path in map(cluster_path, paths):
            try:
                inode = client.lstat(path)
            except FileNotFoundError:
                if force:
                    continue
                raise
            if inode.type == meta_pb2.DIRECTORY:
                if not recursive:
                    raise IsDirectory(f"{path} is a directory: use -r to remove it with all that is in it")
                if path == "/":
                    raise NotEmpty("the root cannot be removed: name what is in it")
                client.rmtree(path)
            else:
                client.unlink(path)
            removed.append(path)
    if options.as_json:
        print_json({"removed": removed})


class Tree:
    """One side of a copy: the local file system or the cluster, with the few operations that `cp` needs."""

    def __init__(self, client: Client | None) -> None:
        self.client = client

    def is_dir(self, path: str) -> bool:
        if self.client is None:
            return os.path.isdir(path)
        try:
            return bool(self.client.stat(path).type == meta_pb2.DIRECTORY)
        except FileNotFoundError:
            return False

    def mkdir(self, path: str) -> None:
        os.makedirs(path, exist_ok=True) if self.client is None else self.client.makedirs(path, exist_ok=True)

    def size(self, path: str) -> int:
        return os.stat(path).st_size if self.client is None else self.client.stat(path).length

    def entries(self, path: str) -> list[tuple[str, str]]:
        """(name, kind) of a directory's entries; kind: file, directory, symlink or other."""
        if self.client is None:
            with os.scandir(path) as scan:
                return [(e.name, "symlink" if e.is_symlink() else "directory" if e.is_dir() else "file" if e.is_file() else "other") for e in scan]
        return [(name, TYPE_NAMES.get(inode.type, "other")) for name, inode in self.client.scandir(path)]

    def open(self, path: str, mode: str) -> Any:
        return open(path, mode, buffering=0) if self.client is None else self.client.open(path, mode, buffering=0)

    def copy_link(self, source: Tree, source_path: str, path: str) -> None:
        target = os.readlink(source_path) if source.client is None else source.client.readlink(source_path)
        if self.client is None:
            os.symlink(target, path)
        else:
            self.client.symlink(target, path)


def side(client: Client, text: str) -> tuple[Tree, str]:
    return (Tree(client), cluster_path(text)) if text.startswith(PREFIX) else (Tree(None), text)


@click.command()
@click.argument("sources", nargs=-1, required=True)
@click.argument("destination")
@click.option("-r", "--recursive", is_flag=True, help="Copy directories.")
@common_options
def cp(options: Options, sources: tuple[str, ...], destination: str, recursive: bool) -> None:
    """Copy SOURCES to DESTINATION; `kvfs:/path` means the cluster, anything else this machine's files."""
    if not any(text.startswith(PREFIX) for text in (*sources, destination)):
        raise InvalidArgument("no path names the cluster: write kvfs:/path for what lies in it")
    with connected(options) as client:
        to, to_path = side(client, destination)
        jobs: list[tuple[Tree, str, str, int]] = []
        links: list[tuple[Tree, str, str]] = []
        into = to.is_dir(to_path)
        if len(sources) > 1 and not into:
            raise NotDirectory(f"{destination} is not a directory: several sources need one")
        for text in sources:
            source, path = side(client, text)
            target = os.path.join(to_path, os.path.basename(path.rstrip("/"))) if into else to_path
            if source.is_dir(path):
                if not recursive:
                    raise IsDirectory(f"{text} is a directory: use -r to copy it with all that is in it")
                walk(source, path, to, target, jobs, links)
            else:
                jobs.append((source, path, target, source.size(path)))
        total = sum(size for *_, size in jobs)
        with progress_bar(total, len(jobs), quiet=options.as_json) as advance, ThreadPoolExecutor(COPY_THREADS) as threads:
            for done in [threads.submit(copy_file, source, path, to, target, advance) for source, path, target, _ in jobs]:
                done.result()
        for source, path, target in links:
            to.copy_link(source, path, target)
    if options.as_json:
        print_json({"files": len(jobs), "links": len(links), "bytes": total})


def walk(source: Tree, path: str, to: Tree, target: str, jobs: list[tuple[Tree, str, str, int]], links: list[tuple[Tree, str, str]]) -> None:
    to.mkdir(target)
    for name, kind in source.entries(path):
        below, beside = os.path.join(path, name), os.path.join(target, name)
        if kind == "directory":
            walk(source, below, to, beside, jobs, links)
        elif kind == "file":
            jobs.append((source, below, beside, source.size(below)))
        elif kind == "symlink":
            links.append((source, below, beside))
        else:
            err_console.print(f"kvfs: {below} is a {kind}: left out", style="yellow")


def copy_file(source: Tree, path: str, to: Tree, target: str, advance: Callable[[int, int], None]) -> None:
    """Copy one file's bytes; a short one needs one buffer of its own size only."""
    with source.open(path, "rb") as reader, to.open(target, "wb") as writer:
        buffer = memoryview(bytearray(min(COPY_BYTES, max(4096, source.size(path)))))
        while count := reader.readinto(buffer):
            done = 0
            while done < count:  # a raw write may take less than it was given
                done += writer.write(buffer[done:count])
            advance(count, 0)
    advance(0, 1)


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
