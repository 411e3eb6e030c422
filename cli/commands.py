"""The `kvfs` command: every subcommand, registered in one place. Commands are imported when they run, so that `kvfs --help` is quick."""

from __future__ import annotations

import importlib
from typing import Any

import click

from kvfs import __version__
from kvfs.cli.context import Options, guarded

# name -> (module, attribute, one line for --help). Services come last: people start them through `up` or systemd.
COMMANDS: dict[str, tuple[str, str, str]] = {
    "up": ("up", "up", "Start a cluster on this machine; remember it in a directory."),
    "status": ("status", "status", "One page: processes, chains, capacity, clients."),
    "down": ("up", "down", "Stop a cluster started with `kvfs up`."),
    "start": ("up", "start", "Start one stopped process of the cluster."),
    "stop": ("up", "stop", "Stop one process of the cluster."),
    "mount": ("mount", "mount", "Mount the cluster."),
    "umount": ("mount", "umount", "Unmount it."),
    "ls": ("files", "ls", "List a directory."),
    "cp": ("copy", "cp", "Copy files in, out or within; kvfs: marks paths of the cluster."),
    "cat": ("files", "cat", "Print files."),
    "rm": ("files", "rm", "Remove files and directories."),
    "mkdir": ("files", "mkdir", "Make directories."),
    "stat": ("files", "stat", "Attributes and layout of files."),
    "bench": ("bench", "bench", "Measure KV-cache spaces; replay request traces."),
    "kv": ("kv", "kv", "Spaces of KV-cache blocks: make, put, get, look at."),
    "serve": ("serve", "serve", "Serve a model over HTTP as OpenAI does, its KV cache on kvfs."),
    "fsck": ("fsck", "fsck", "Check metadata against chunks, or one target."),
    "config": ("config", "config", "Show configuration."),
    "admin": ("admin", "admin", "Nodes, chains, targets, clients."),
    "demo": ("demo", "demo", "The whole story on real files: start, copy, kill, recover, compare."),
    "demo-kvcache": ("demo_kvcache", "demo_kvcache", "The KV cache: put, get, restart, replay a workload in too little room."),
    "demo-inference": ("demo_inference", "demo_inference", "A model served with its KV cache on kvfs: cold, warm, after a restart."),
    "manager": ("services", "manager", "Run a cluster manager in the foreground."),
    "meta": ("services", "meta", "Run a metadata service in the foreground."),
    "storage": ("services", "storage", "Run a storage service in the foreground."),
    "worker": ("worker", "worker", "Run an inference worker in the foreground."),
    "supervise": ("up", "supervise", "Run the supervisor of a cluster directory in the foreground."),
}
UNLISTED = {"supervise"}
"""What only `kvfs up` and systemd start."""


class LazyGroup(click.Group):
    """A group whose commands are imported on first use."""

    def invoke(self, ctx: click.Context) -> Any:
        return guarded(super().invoke)(ctx)  # a command that is still imported cannot say by itself that it was interrupted

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        entry = COMMANDS.get(cmd_name)
        if entry is None:
            return None
        command = getattr(importlib.import_module(f"kvfs.cli.{entry[0]}"), entry[1])
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, help_text) for name, (_, _, help_text) in COMMANDS.items() if name not in UNLISTED])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="kvfs")
@click.option("--cluster", default="", help="Directory made by `kvfs up`, or manager addresses host:port[,host:port]. Default: $KVFS_CLUSTER.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def cli(context: click.Context, cluster: str, as_json: bool) -> None:
    """kvfs: a distributed file system for AI clusters."""
    context.obj = Options(cluster=cluster, as_json=as_json)
