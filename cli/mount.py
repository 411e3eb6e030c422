"""`kvfs mount` and `kvfs umount`. A mount is one process; without --foreground it is started detached and this returns once the mount answers."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click

from kvfs.cli import process
from kvfs.cli.children import kvfs_argv
from kvfs.cli.context import Options, common_options, print_json
from kvfs.common import config as configuration
from kvfs.common.errors import DeadlineExceeded, MountError
from kvfs.fuse import kernel

MOUNT_TIMEOUT_S = 60.0
UMOUNT_TIMEOUT_S = 60.0


def check_mount_point(path: str) -> None:
    """Raises MountError, with what to do, before any process is started: /dev/fuse, and a mount point that is an empty, unused directory."""
    kernel.check_device()
    kernel.check_mount_point(path)


@click.command()
@click.argument("mount_point", type=click.Path(path_type=Path))
@click.option("--foreground", is_flag=True, help="Stay in the foreground.")
@click.option("-o", "mount_options", default="", help="Comma-separated: ro, allow_other, noallow_other, and key=value of the [mount] configuration.")
@click.option("--config", "config_file", type=click.Path(dir_okay=False, path_type=Path), default=None, help="TOML file with a [mount] section.")
@common_options
def mount(options: Options, mount_point: Path, foreground: bool, mount_options: str, config_file: Path | None) -> None:
    """Mount the cluster at MOUNT_POINT, an empty directory."""
    path = str(mount_point.expanduser().absolute())
    spec = options.cluster_spec()
    options.directory()  # a wrong name is found before anything is started
    check_mount_point(path)
    if foreground:
        sys.exit(run_mount(spec, path, mount_options, config_file))
    arguments = ["mount", path, "--foreground", "--cluster", spec]
    if mount_options:
        arguments += ["-o", mount_options]
    if config_file:
        arguments += ["--config", str(config_file.absolute())]
    pid = start_detached(kvfs_argv(*arguments), path)
    if options.as_json:
        print_json({"mount_point": path, "pid": pid})


def start_detached(argv: list[str], path: str) -> int:
    """Start a mount process and wait until it says that the mount answers; returns its pid. Raises MountError with its last words."""
    ready_read, ready_write = os.pipe()
    log_dir = Path(os.environ.get("XDG_STATE_HOME", str(Path.home() / ".local" / "state"))) / "kvfs"
    log_dir.mkdir(parents=True, exist_ok=True)
    log_file = log_dir / f"mount{path.replace('/', '-')}.log"
    with open(log_file, "ab") as out:
        start = out.tell()
        started = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True, cwd="/", pass_fds=(ready_write,),
            env={**os.environ, "KVFS_READY_FD": str(ready_write)},
        )  # fmt: skip
    os.close(ready_write)
    with os.fdopen(ready_read) as pipe:
        if pipe.readline():
            return started.pid
    status = started.wait(MOUNT_TIMEOUT_S)
    raise MountError(process.last_words(log_file, start) or f"the mount ended at once (status {status}): see {log_file}")


def run_mount(spec: str, path: str, mount_options: str, config_file: Path | None) -> int:
    """The mount process itself."""
    from dataclasses import replace

    from kvfs.fuse.config import MountConfig
    from kvfs.fuse.mount import mount as serve

    process.configure_logging()
    config = replace(configuration.load(MountConfig, config_file, os.environ, "mount"), mount_point=path, cluster=spec)
    config = replace(config, **parse_options(mount_options, config))
    if config.allow_other and "allow_other" not in mount_options.split(",") and not kernel.may_allow_other():
        # The default is for root; an ordinary user's own mount must not fail for it. Who asks for it by name is told why it cannot be.
        process.log.info("without allow_other: an ordinary user needs user_allow_other in /etc/fuse.conf for that")
        config = replace(config, allow_other=False)

    async def main(ready: process.Ready) -> None:
        import trio

        async with trio.open_nursery() as nursery:
            await nursery.start(serve, config)
            ready({"addresses": [path]})

    return process.run_process(main)


IGNORED_OPTIONS = {"defaults", "rw", "_netdev", "nofail", "auto", "noauto", "user", "users", "nouser", "owner", "group"}
IGNORED_OPTIONS |= {"exec", "suid", "dev", "async", "relatime", "norelatime", "noatime", "nodiratime", "strictatime", "lazytime"}


def parse_options(text: str, config: Any) -> dict[str, Any]:
    """-o options as fields of MountConfig. Those that mount(8) keeps for itself are taken without a word; unknown ones raise MountError."""
    fields = {name: getattr(config, name) for name in type(config).__dataclass_fields__}
    found: dict[str, Any] = {}
    for option in filter(None, text.split(",")):
        name, equals, value = option.partition("=")
        name = {"ro": "read_only"}.get(name, name)
        negated = name.startswith("no") and name[2:] in fields
        if name in IGNORED_OPTIONS or name.startswith("x-"):
            continue
        key = name[2:] if negated else name
        if key not in fields or key in ("mount_point", "cluster"):
            raise MountError(f"unknown mount option {name!r}; there are: {', '.join(sorted(set(fields) - {'mount_point', 'cluster'}))}")
        kind = type(fields[key])
        try:
            found[key] = (not negated) if kind is bool and not equals else kind(value)
        except ValueError:
            raise MountError(f"mount option {name}: {value!r} is not {configuration.name_of(kind)}") from None
    return found


@click.command()
@click.argument("mount_point", type=click.Path(path_type=Path))
@click.option("--lazy", is_flag=True, help="Detach now, clean up when the last user is gone.")
@common_options
def umount(options: Options, mount_point: Path, lazy: bool) -> None:
    """Unmount MOUNT_POINT: what was written is flushed first."""
    path = str(mount_point.expanduser().absolute())
    unmount(path, lazy=lazy)
    if options.as_json:
        print_json({"mount_point": path, "mounted": False})


def unmount(path: str, *, lazy: bool = False) -> None:
    """Returns when the mount is gone. Raises MountError when nothing of ours is mounted there or someone uses it."""
    path = os.path.realpath(path) if not lazy else path  # realpath of a dead mount would fail
    kernel.unmount(path, lazy=lazy)
    deadline_s = time.monotonic() + UMOUNT_TIMEOUT_S
    while is_mounted(path):
        if time.monotonic() > deadline_s:
            raise DeadlineExceeded(f"{path} is still mounted after {UMOUNT_TIMEOUT_S:.0f} s")
        time.sleep(0.02)


def is_mounted(path: str) -> bool:
    entry = kernel.mount_entry(path)
    return entry is not None and entry.type == kernel.FILE_SYSTEM_TYPE
