"""`kvfs kv`: spaces of KV-cache blocks made, listed, looked at and dropped, and single blocks put, got, looked for and evicted.

Owns what these commands print. A block that is not there, and one that storage refused, are errors with exit status 1: a person or a script that
names a block wants to know, where an engine would compute it again.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from kvfs.cli.arguments import BlockKey, Size, block_key, pairs
from kvfs.cli.context import Options, common_options, console, human_bytes, print_json, table
from kvfs.cli.files import connected
from kvfs.common.errors import InputOutput, InvalidArgument, KvfsError, NotFound
from kvfs.kvcache import KVCache, Put, Space, SpaceCounters, SpaceParams, SpaceStats
from kvfs.kvcache.params import REPLICATION_MAX

REASONS = {
    "full": "storage is full",
    "late": "the storage services did not answer in time",
    "corrupt": "what is stored does not match its checksum",
    "dropped": "the space was dropped",
    "unchecked": "the metadata service could not be asked whether the space is still there",
    "resting": "its chain has not answered lately",
    "failed": "the storage services could not be reached",
}
"""Of what went wrong, by the counter that tells it."""
TEXT_OPTION = click.option("--text", is_flag=True, help="KEY is any text; its SHA-256 is the key. Without it: 16 to 64 bytes in hexadecimal.")


@click.group()
def kv() -> None:
    """Spaces of KV-cache blocks, and single blocks.

    KEY is 16 to 64 bytes in hexadecimal, as engines compute them, or any text with --text.
    """


@contextmanager
def caches(options: Options) -> Iterator[KVCache]:
    with connected(options) as client:
        yield KVCache(client)


def trouble(counters: SpaceCounters) -> str:
    """What kept a block from being stored or read; empty: nothing did."""
    return "; ".join(words for name, words in REASONS.items() if getattr(counters, name))


def describe(name: str, params: SpaceParams) -> dict[str, Any]:
    return {
        "name": name,
        "block_tokens": params.block_tokens,
        "block_bytes": params.block_bytes,
        "format": params.format,
        "digest": params.digest.hex(),
        "replication": params.replication,
        "table": params.table,
        "quota_bytes": params.quota_bytes,
        "ttl_s": params.ttl_s,
    }


def describe_stats(stats: SpaceStats) -> dict[str, Any]:
    """`packing`: which share of the bytes taken from the disks are block bytes; None while nothing is stored."""
    lookups = stats.hits + stats.misses
    counted = ("inode", "chains", "targets", "blocks", "bytes", "block_space", "allocated_bytes")
    events = ("hits", "misses", "stored", "present", "evicted", "expired", "removed")
    return (
        describe(stats.name, stats.params)
        | {name: getattr(stats, name) for name in counted}
        | {"packing": packing(stats)}
        | {name: getattr(stats, name) for name in events}
        | {"hit_share": stats.hits / lookups if lookups else None}
    )


def packing(stats: SpaceStats) -> float | None:
    return stats.bytes / stats.allocated_bytes if stats.allocated_bytes else None


def share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


# --- spaces ------------------------------------------------------------------------------------------------------------------------------


@kv.command()
@click.argument("space")
@click.option("--block-bytes", type=Size(), required=True, help="A block has at most so many; up to 64M.")
@click.option("--block-tokens", type=click.IntRange(min=1), required=True, help="Tokens whose cache one block holds.")
@click.option("--model", default="", help="Format field: the model.")
@click.option("--dtype", default="", help="Format field: the type of the numbers.")
@click.option("--layout", default="", help="Format field: how they lie.")
@click.option("--rope", default="", help="Format field: the form of the position embedding.")
@click.option("--format", "extra", multiple=True, callback=pairs, metavar="NAME=VALUE", help="A further format field; any number of them.")
@click.option("--replicas", type=click.IntRange(1, REPLICATION_MAX), default=None, help="Copies of each block (default: those of the chain table).")
@click.option("--table", "table_id", type=click.IntRange(1, 65535), default=None, help="Chain table (default: the first of that replication).")
@click.option("--quota", type=Size(), default=None, help="Bytes of blocks, copies not counted; beyond it the least recently used go.")
@click.option("--ttl", "ttl_s", type=float, default=None, metavar="SECONDS", help="A block that nobody used for so long goes.")
@click.option("--exist-ok", is_flag=True, help="A space of that name with blocks of this format is no error.")
@common_options
def create(
    options: Options,
    space: str,
    block_bytes: int,
    block_tokens: int,
    model: str,
    dtype: str,
    layout: str,
    rope: str,
    extra: dict[str, str],
    replicas: int | None,
    table_id: int | None,
    quota: int | None,
    ttl_s: float | None,
    exist_ok: bool,
) -> None:
    """Make SPACE: blocks of one model in one format. It is a directory under /kvcache of the cluster."""
    params = SpaceParams(
        block_tokens=block_tokens,
        block_bytes=block_bytes,
        model=model,
        dtype=dtype,
        layout=layout,
        rope=rope,
        extra=extra,
        replication=replicas or 0,
        table=table_id or 0,
        quota_bytes=quota,
        ttl_s=ttl_s,
    )
    with caches(options) as cache:
        made = cache.create(space, params, exist_ok=exist_ok)
    if options.as_json:
        print_json(describe(space, made.params) | {"inode": made.inode})
    else:
        where = f"table {made.params.table} ({made.params.replication} copies)"
        console.print(f"{space}: blocks of {block_tokens} tokens, up to {human_bytes(block_bytes)}, on {where}")


@kv.command()
@common_options
def ls(options: Options) -> None:
    """All spaces with their parameters."""
    with caches(options) as cache:
        rows = [describe(name, params) for name, params in sorted(cache.list().items())]
    if options.as_json:
        print_json(rows)
        return
    right = ("tokens", "bytes", "copies", "table", "quota", "ttl")
    made = table("space", *right, "format", right=right)
    for row in rows:
        quota = human_bytes(row["quota_bytes"]) if row["quota_bytes"] else "-"
        ttl = f"{row['ttl_s']:g} s" if row["ttl_s"] else "-"
        text = ", ".join(f"{name}={value}" for name, value in row["format"].items())
        counts = (row["block_tokens"], row["block_bytes"], row["replication"], row["table"])
        made.add_row(row["name"], *map(str, counts), quota, ttl, text)
    console.print(made)


@kv.command()
@click.argument("spaces", nargs=-1)
@common_options
def stat(options: Options, spaces: tuple[str, ...]) -> None:
    """Parameters and live statistics of SPACES (default: all): blocks, what they take from the disks, hits, evictions."""
    with caches(options) as cache:
        rows = [describe_stats(cache.stats(name)) for name in spaces or sorted(cache.list())]
    if options.as_json:
        print_json(rows)
        return
    for row in rows:
        made = table("", "")
        for key, value in row.items():
            made.add_row(key, _shown(key, value))
        console.print(made)


def _shown(key: str, value: Any) -> str:
    if key in ("packing", "hit_share"):
        return share(value)
    if value is None:
        return "-"
    if key == "format":
        return ", ".join(f"{name}={text}" for name, text in value.items()) or "-"
    if key in ("bytes", "block_space") or key.endswith("_bytes"):
        return f"{human_bytes(value)} ({value})" if value > 1024 else str(value)
    return f"{value:g} s" if key == "ttl_s" else str(value)


@kv.command()
@click.argument("space")
@common_options
def drop(options: Options, space: str) -> None:
    """Drop SPACE with all its blocks: gone at once, disk space comes back in the background."""
    with caches(options) as cache:
        cache.drop(space)
    if options.as_json:
        print_json({"dropped": space})


@kv.command()
@click.argument("space")
@click.argument("blocks", type=click.IntRange(min=1), required=False)
@click.option("--all", "everything", is_flag=True, help="Every block.")
@common_options
def evict(options: Options, space: str, blocks: int | None, everything: bool) -> None:
    """Remove about BLOCKS blocks of SPACE, the least recently used of each chain first."""
    if (blocks is None) != everything:
        raise click.UsageError("say how many BLOCKS, or --all")
    with caches(options) as cache:
        opened = cache.open(space)
        gone = _evict_all(opened) if blocks is None else opened.evict(blocks)
    if options.as_json:
        print_json({"space": space, "evicted": gone})
    else:
        click.echo(f"{gone} blocks evicted")


def _evict_all(space: Space) -> int:
    """One call after another: each ends before its deadline, with what it has done. Every chain is asked for as much as all of them have."""
    gone = 0
    while True:
        stats = space.stats()
        step = space.evict(stats.blocks * stats.chains) if stats.blocks else 0
        gone += step
        if not step:
            return gone


# --- blocks ------------------------------------------------------------------------------------------------------------------------------


def told(options: Options, space: str, key: BlockKey, outcome: str, length: int | None) -> None:
    """`length`: of the block, where it is known."""
    if options.as_json:
        print_json({"space": space, **key.describe(), "outcome": outcome, "bytes": length})


@kv.command()
@click.argument("space")
@click.argument("key")
@click.argument("file", type=click.Path(dir_okay=False, allow_dash=True, path_type=Path))
@TEXT_OPTION
@common_options
def put(options: Options, space: str, key: str, file: Path, text: bool) -> None:
    """Store FILE (- for standard input) as the block KEY of SPACE. A block that is there already stays as it is."""
    named = block_key(key, text)
    with caches(options) as cache:
        opened = cache.open(space)
        if str(file) == "-" and sys.stdin is None:
            raise InvalidArgument("standard input is closed")
        with click.open_file(str(file), "rb") as source:
            data = source.read(opened.block_bytes + 1)
        if len(data) > opened.block_bytes:
            raise InvalidArgument(f"{file} is longer than a block of space {space}: those have at most {opened.block_bytes} bytes")
        if not data:
            raise InvalidArgument(f"{file} is empty, and a block never is")
        [outcome] = opened.put([named.key], [data])
        if not outcome:
            raise InputOutput(f"the block was not stored: {trouble(opened.counters) or 'storage refused it'}")
    stored = outcome is Put.STORED
    told(options, space, named, outcome.value, len(data) if stored else None)
    if not options.as_json:
        click.echo(f"{outcome.value}: {named.key.hex()}" + (f", {len(data)} bytes" if stored else " stays as the first writer put it"))


@kv.command()
@click.argument("space")
@click.argument("key")
@click.argument("file", type=click.Path(dir_okay=False, allow_dash=True, path_type=Path))
@TEXT_OPTION
@common_options
def get(options: Options, space: str, key: str, file: Path, text: bool) -> None:
    """Write the block KEY of SPACE to FILE (- for standard output). If it is not there FILE is not touched, and the exit status is 1."""
    named = block_key(key, text)
    with caches(options) as cache:
        opened = cache.open(space)
        buffer = memoryview(bytearray(opened.block_bytes))
        [length] = opened.get([named.key], [buffer])
        if length is None:
            raise _miss(space, named, opened.counters)
        if str(file) == "-":
            if sys.stdout is None:
                raise InvalidArgument("standard output is closed")
            sys.stdout.buffer.write(buffer[:length])
            sys.stdout.buffer.flush()
        else:
            file.write_bytes(buffer[:length])
    if str(file) != "-":
        told(options, space, named, "hit", length)


def _miss(space: str, key: BlockKey, counters: SpaceCounters) -> KvfsError:
    reason = trouble(counters)
    if reason:
        return InputOutput(f"block {key.written} of space {space} was not read: {reason}")
    return NotFound(f"there is no block {key.written} in space {space}")


@kv.command()
@click.argument("space")
@click.argument("keys", nargs=-1, required=True)
@TEXT_OPTION
@common_options
def exists(options: Options, space: str, keys: tuple[str, ...], text: bool) -> None:
    """Whether each of KEYS is in SPACE; nothing counts as used. Exit status 1 unless all are."""
    named = [block_key(key, text) for key in keys]
    with caches(options) as cache:
        opened = cache.open(space)
        found = opened.exists([each.key for each in named])
        reason = trouble(opened.counters)
    if options.as_json:
        print_json([{**each.describe(), "present": there} for each, there in zip(named, found, strict=True)])
    else:
        for each, there in zip(named, found, strict=True):
            click.echo(f"{'present' if there else 'absent'}: {each.written}")
    if reason:
        raise InputOutput(f"not every answer is known: {reason}")
    if not all(found):
        sys.exit(1)
