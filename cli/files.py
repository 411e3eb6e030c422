"""`kvfs ls`, `cat`, `rm`, `mkdir`, `stat`: files through the native client, no mount needed. Paths of the cluster may carry a `kvfs:` prefix.

Owns how a file's attributes are shown. A name is printed as it is, whatever characters it has; only a table replaces control characters, which
would break its lines.
"""

from __future__ import annotations

import base64
import os
import stat as stat_module
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import Any, BinaryIO

import click

from kvfs.cli.context import Options, common_options, console, human_bytes, print_json, table
from kvfs.client import Client
from kvfs.common.errors import BadHandle, IsDirectory, NotEmpty
from kvfs.common.wire import meta_pb2

PREFIX = "kvfs:"
COPY_BYTES = 8 << 20
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


def printable(name: str) -> str:
    """For people's eyes: one line, nothing that a terminal obeys, bytes that are no text as a question mark."""
    return "".join(char if char.isprintable() else "?" for char in name)


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
            name = printable(os.path.basename(row["path"]) + (f" -> {row['target']}" if "target" in row else ""))
            made.add_row(
                stat_module.filemode(bits | int(row["mode"], 8)), str(row["nlink"]), str(row["uid"]), str(row["gid"]), str(row["length"]), when, name
            )
        console.print(made)
    else:
        for row in rows:
            name = os.path.basename(row["path"]) + ("/" if row["type"] == "directory" else "")
            click.echo(printable(name) if console.is_terminal else os.fsencode(name))


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
            made.add_row(key, human_bytes(value) + f" ({value})" if key == "length" and value > 1024 else printable(str(value)))
        console.print(made)


@click.command()
@click.argument("paths", nargs=-1, required=True)
@common_options
def cat(options: Options, paths: tuple[str, ...]) -> None:
    """Print files to standard output; with --json their contents as text, or in base64 where they are not UTF-8."""
    if sys.stdout is None:
        raise BadHandle("standard output is closed: there is nowhere to print to")
    with connected(options) as client:
        if options.as_json:
            print_json([contents(path, client.read_bytes(path)) for path in map(cluster_path, paths)])
            return
        for path in map(cluster_path, paths):
            with client.open(path, "rb", buffering=0) as source:
                buffer = memoryview(bytearray(COPY_BYTES))
                while count := source.readinto(buffer):
                    write_all(sys.stdout.buffer, buffer[:count])
    sys.stdout.buffer.flush()


def write_all(out: BinaryIO, data: memoryview) -> None:
    """Python's own standard output is a raw file with PYTHONUNBUFFERED, and may then take less than it was given."""
    while data:
        data = data[out.write(data) :]


def contents(path: str, data: bytes) -> dict[str, Any]:
    try:
        return {"path": path, "length": len(data), "text": data.decode()}
    except UnicodeDecodeError:
        return {"path": path, "length": len(data), "base64": base64.b64encode(data).decode()}


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
