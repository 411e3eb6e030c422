"""`kvfs manager`, `kvfs meta`, `kvfs storage`: one service in the foreground, as the supervisor, systemd or a container runs it."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import click
import trio

from kvfs.cli import process
from kvfs.cli.context import guarded
from kvfs.common import config as configuration

CONFIG_OPTION = click.option(
    "--config", "config_file", type=click.Path(dir_okay=False, path_type=Path), default=None, help="TOML file; KVFS_<SECTION>__<KEY> overrides it."
)


YOUNG_OBJECTS = 20_000
"""The collector looks at new objects when there are so many: at its usual 700 a service spends a tenth of its time there, and finds nothing, since
what a request leaves behind has no circles."""


def run_service(section: str, config_class: type[Any], serve: Callable[..., Awaitable[None]], config_file: Path | None) -> None:
    """Load the section's configuration, run the service until it is asked to stop, exit with process.py's status."""
    process.configure_logging()
    config = guarded(configuration.load)(config_class, config_file, os.environ, section)

    async def main(ready: process.Ready) -> None:
        async with trio.open_nursery() as nursery:
            info = await nursery.start(serve, config)
            gc.freeze()
            gc.set_threshold(YOUNG_OBJECTS)
            ready(info if isinstance(info, dict) else {"addresses": list(info or ())})

    sys.exit(process.run_process(main))


@click.command(hidden=True)
@CONFIG_OPTION
def manager(config_file: Path | None) -> None:
    """Run a cluster manager in the foreground."""
    from kvfs.meta.cluster.config import ManagerConfig
    from kvfs.meta.cluster.server import serve

    run_service("manager", ManagerConfig, serve, config_file)


@click.command(hidden=True)
@CONFIG_OPTION
def meta(config_file: Path | None) -> None:
    """Run a metadata service in the foreground."""
    from kvfs.meta.config import MetaConfig
    from kvfs.meta.server import serve

    run_service("meta", MetaConfig, serve, config_file)


@click.command(hidden=True)
@CONFIG_OPTION
def storage(config_file: Path | None) -> None:
    """Run a storage service in the foreground."""
    from kvfs.storage.config import StorageConfig
    from kvfs.storage.server import serve

    run_service("storage", StorageConfig, serve, config_file)
