"""What commands share: which cluster is meant, how to print, and the one place where an error becomes words and an exit status.

Exit status: 0 done; 1 an operation failed; 2 wrong usage or a setup that a person must change. No traceback reaches a user: an unexpected
exception prints one line and goes whole into a log file whose name that line gives.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, TextIO, TypeVar

import click
from rich.console import Console
from rich.table import Table

from kvfs.cli import cluster_dir
from kvfs.cli.process import MARK, first_error
from kvfs.common.errors import KvfsError, SetupError

P = ParamSpec("P")
R = TypeVar("R")

PIPE_COLUMNS = 10_000
"""Width where nobody looks at a terminal: what another program reads is never folded."""


def console_for(stream: TextIO | None, *, stderr: bool) -> Console:
    """A console that prints text as it is: names of files may look like markup or emoji."""
    watched = stream is not None and stream.isatty()
    return Console(stderr=stderr, highlight=False, markup=False, emoji=False, width=None if watched else PIPE_COLUMNS)


console = console_for(sys.stdout, stderr=False)
err_console = console_for(sys.stderr, stderr=True)


@dataclass(slots=True)
class Options:
    """The group's options. `cluster`: a directory made by `kvfs up`, manager addresses, or empty for the default directory."""

    cluster: str = ""
    as_json: bool = False

    def cluster_spec(self) -> str:
        return self.cluster or os.environ.get("KVFS_CLUSTER", "") or str(cluster_dir.default_directory())

    def directory(self) -> cluster_dir.ClusterDir | None:
        """The cluster's directory on this machine, or None when the cluster is named by addresses."""
        spec = self.cluster_spec()
        return None if is_address(spec) else cluster_dir.load(Path(spec).expanduser().resolve())


def is_address(spec: str) -> bool:
    """Whether a cluster is named by its managers' addresses and not by a directory."""
    return "://" in spec or (":" in spec and not os.path.exists(spec) and not spec.startswith(("/", ".", "~")))


def common_options(command: Callable[..., R]) -> Callable[..., R]:
    """--cluster and --json on every command, after as well as before its name; guards against tracebacks."""

    @click.option("--cluster", default=None, help="Directory made by `kvfs up`, or manager addresses host:port[,host:port]. Default: $KVFS_CLUSTER.")
    @click.option("--json", "as_json", is_flag=True, default=None, help="Print JSON.")
    @functools.wraps(command)
    def wrapped(*args: Any, cluster: str | None, as_json: bool | None, **kwargs: Any) -> R:
        context = click.get_current_context()
        options = context.ensure_object(Options)
        options.cluster = cluster or options.cluster
        options.as_json = bool(as_json) or options.as_json
        return guarded(context.invoke)(command, options, *args, **kwargs)

    return wrapped


def guarded(function: Callable[P, R]) -> Callable[P, R]:
    """Turn errors into one line and an exit status."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except (click.exceptions.ClickException, click.exceptions.Exit, click.exceptions.Abort, SystemExit):
            raise
        except BaseException as caught:
            sys.exit(report(caught))

    return wrapped


def report(caught: BaseException) -> int:
    """Print what went wrong; returns the exit status."""
    error = first_error(caught)
    if isinstance(error, KvfsError):
        print(f"{MARK}{error.message}", file=sys.stderr)
        return 2 if isinstance(error, SetupError) else 1
    if isinstance(error, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader left: nothing more to say, also not at exit
        return 1
    if isinstance(error, KeyboardInterrupt):
        print("kvfs: interrupted", file=sys.stderr)
        return 130
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        print(f"{MARK}{where}{error.strerror or error}", file=sys.stderr)
        return 1
    with tempfile.NamedTemporaryFile("w", prefix="kvfs-crash-", suffix=".log", delete=False) as out:
        traceback.print_exception(caught, file=out)
    print(f"{MARK}unexpected {type(error).__name__}: {error}. Please report it with {out.name}", file=sys.stderr)
    return 1


def print_json(value: object) -> None:
    click.echo(json.dumps(value, indent=2, default=str))


def table(*columns: str, right: tuple[str, ...] = ()) -> Table:
    made = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return made


def human_bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} PiB"
