"""`kvfs config dump`: every configuration key with its value, defaults and environment applied."""

from __future__ import annotations

import importlib
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from kvfs.cli.context import Options, common_options, print_json
from kvfs.common import config as configuration

SECTIONS = {
    "manager": ("kvfs.meta.cluster.config", "ManagerConfig"),
    "meta": ("kvfs.meta.config", "MetaConfig"),
    "storage": ("kvfs.storage.config", "StorageConfig"),
    "client": ("kvfs.client.config", "ClientConfig"),
    "mount": ("kvfs.fuse.config", "MountConfig"),
}


@click.group()
def config() -> None:
    """Show configuration."""


@config.command()
@click.argument("sections", nargs=-1, type=click.Choice(list(SECTIONS)))
@click.option("--config", "config_file", type=click.Path(dir_okay=False, path_type=Path), default=None, help="TOML file to read.")
@common_options
def dump(options: Options, sections: tuple[str, ...], config_file: Path | None) -> None:
    """Every key of SECTIONS (all of them by default) as TOML: the file, then KVFS_<SECTION>__<KEY> from the environment, over the defaults."""
    values: dict[str, Any] = {}
    texts = []
    for section in sections or SECTIONS:
        module, name = SECTIONS[section]
        loaded = configuration.load(getattr(importlib.import_module(module), name), config_file, os.environ, section)
        values[section] = asdict(loaded)
        texts.append(configuration.dump(loaded, section))
    if options.as_json:
        print_json(values)
    else:
        click.echo("\n".join(text.rstrip() + "\n" for text in texts), nl=False)
