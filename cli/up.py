"""`kvfs up`, `down`, `start`, `stop`, and the supervisor's own entry point."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

import click
import trio

from kvfs.cli import cluster_dir, control, process
from kvfs.cli.bring_up import bring_up
from kvfs.cli.context import Options, common_options, err_console, guarded, is_address, print_json
from kvfs.cli.mount import check_mount_point
from kvfs.cli.status import collect, print_status
from kvfs.cli.supervisor import run_supervisor, spawn_supervisor
from kvfs.common.errors import SetupError, WrongDataDirectory

UP_TIMEOUT_S = 120.0
DOWN_TIMEOUT_S = 90.0
CHUNK_SIZES = [1 << shift for shift in range(16, 27)]


@click.command()
@click.argument("directory", type=click.Path(file_okay=False, path_type=Path), required=False)
@click.option("--storage", type=click.IntRange(1, 64), default=None, help="Number of storage services (new cluster: 3).")
@click.option("--replicas", type=click.IntRange(1, 5), default=None, help="Copies of each chunk (new cluster: 3, or as many as there are services).")
@click.option("--mount", "mount_point", type=click.Path(path_type=Path), default=None, help="Mount the cluster there.")
@click.option("--no-mount", is_flag=True, help="Forget the mount point that an earlier --mount made the cluster remember.")
@click.option(
    "--chunk-size", type=click.Choice([str(size) for size in CHUNK_SIZES]), default=str(1 << 20), help="Bytes, for new files of a new cluster."
)
@click.option("--lease-ms", type=click.IntRange(500, 60_000), default=2000, help="Heartbeat lease of a new cluster.")
@click.option("--port", type=click.IntRange(1024, 65_000), default=None, help="Manager's port of a new cluster, meta one above (default: free ones).")
@click.option("--no-restart", is_flag=True, help="Leave processes that die as they are.")
@click.option("--foreground", is_flag=True, help="Stay in the foreground; Ctrl-C stops the cluster.")
@common_options
def up(
    options: Options,
    directory: Path | None,
    storage: int | None,
    replicas: int | None,
    mount_point: Path | None,
    chunk_size: str,
    lease_ms: int,
    port: int | None,
    no_mount: bool,
    no_restart: bool,
    foreground: bool,
) -> None:
    """Start a cluster on this machine: a manager, metadata, storage services, and a mount if asked for.

    DIRECTORY keeps its data and its name; a second `kvfs up` on it starts the same cluster again with what it holds.
    """
    if mount_point and no_mount:
        raise click.UsageError("--mount and --no-mount together make no sense")
    path = named_directory(options, directory)
    mount = str(mount_point.expanduser().absolute()) if mount_point else None
    if mount and not is_running(path):
        check_mount_point(mount)  # before anything is made or remembered: a wrong one must not be in the way of the next start
    before = cluster_dir.load(path).mount if cluster_dir.is_cluster_dir(path) else None
    cluster = prepare(path, storage, replicas, None if no_mount else mount, int(chunk_size), lease_ms, port)
    running = control.is_running(cluster.control_socket)
    if not running and (no_mount or mount not in (None, cluster.mount)):
        cluster = cluster.with_mount(None if no_mount else mount)
        cluster.save()
    if foreground:
        if running:
            raise SetupError(f"{path} is already running: `kvfs status --cluster {path}`, or `kvfs down` first")
        err_console.print(f"kvfs: running {path} in the foreground; Ctrl-C stops it")
        process.configure_logging()
        sys.exit(run_supervisor(cluster, restart=not no_restart, bring_up=lambda: bring_up(cluster), stay_when_failed=False))
    if running:
        complete(cluster, mount, no_mount=no_mount)
    else:
        try:
            start_detached(cluster, restart=not no_restart)
        except SetupError:
            if mount and mount != before:  # it could not be mounted, perhaps: the next start must not fail for that
                cluster.with_mount(before).save()
            raise
    report = trio.run(collect, cluster.managers, cluster)
    if options.as_json:
        print_json(report)
    else:
        print_status(report)


def named_directory(options: Options, directory: Path | None) -> Path:
    """Where the cluster of this machine lies. Raises SetupError when --cluster or KVFS_CLUSTER names one elsewhere."""
    spec = str(directory) if directory else options.cluster_spec()
    if directory is None and is_address(spec):
        raise SetupError(f"{spec} is the address of a manager: `kvfs up` needs a directory, `kvfs up DIR`")
    return Path(spec).expanduser().resolve()


def is_running(path: Path) -> bool:
    return cluster_dir.is_cluster_dir(path) and control.is_running(cluster_dir.load(path).control_socket)


def prepare(
    path: Path, storage: int | None, replicas: int | None, mount: str | None, chunk_size_bytes: int, lease_ms: int, port: int | None
) -> cluster_dir.ClusterDir:
    """The remembered cluster, or a new one. Options that an existing cluster has settled otherwise are refused, not ignored."""
    if not cluster_dir.is_cluster_dir(path):
        storage = storage or 3
        replicas = replicas or min(3, storage)
        if replicas > storage:
            raise SetupError(f"{replicas} replicas need at least {replicas} storage services: say --storage {replicas}, or fewer --replicas")
        return cluster_dir.create(
            path, storage=storage, replicas=replicas, mount=mount, chunk_size_bytes=chunk_size_bytes, lease_ms=lease_ms, base_port=port
        )
    known = cluster_dir.load(path)
    for name, wanted, has in (("--storage", storage, known.storage), ("--replicas", replicas, known.replicas)):
        if wanted is not None and wanted != has:
            raise WrongDataDirectory(f"the cluster in {path} was made with {name} {has}: leave {name} out, or name another directory")
    cluster_dir.write_configs(known)
    return known


def complete(cluster: cluster_dir.ClusterDir, mount: str | None, *, no_mount: bool) -> None:
    """The cluster runs already: start what is not running, and the mount if asked for; remember that only once it is there."""
    for child in control.request(cluster.control_socket, "status")["processes"]:
        if child["role"] == "mount" and (mount or no_mount):
            continue
        if child["state"] in ("stopped", "failed", "restarting"):
            control.request(cluster.control_socket, "start", name=child["id"], timeout_s=UP_TIMEOUT_S)
    if mount:
        control.request(cluster.control_socket, "mount", path=mount, timeout_s=UP_TIMEOUT_S)
    if (mount or no_mount) and cluster.mount != mount:
        cluster.with_mount(mount).save()


def start_detached(cluster: cluster_dir.ClusterDir, *, restart: bool) -> None:
    """Start the supervisor and wait until the cluster serves. Raises SetupError with the words of what failed. Nothing is left running when this
    raises, also when it is interrupted."""
    with process.interruptible():
        supervisor = spawn_supervisor(cluster.path, restart=restart)
        try:
            _wait_until_ready(cluster, supervisor)
        except BaseException:
            supervisor.terminate()  # another `kvfs up`'s goes on: ours has ended by itself then
            try:
                supervisor.wait(DOWN_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                supervisor.kill()  # its children see that it is gone
            raise


def _wait_until_ready(cluster: cluster_dir.ClusterDir, supervisor: subprocess.Popen[bytes]) -> None:
    deadline_s = time.monotonic() + UP_TIMEOUT_S
    with err_console.status("kvfs: starting") as spinner:
        while time.monotonic() < deadline_s:
            if supervisor.poll() is not None and not control.is_running(cluster.control_socket):  # else another `kvfs up` was faster: wait for its
                words = process.last_words(cluster.log_file("supervisor")) or f"status {supervisor.returncode}"
                raise SetupError(f"the supervisor ended at once ({words}): see {cluster.log_file('supervisor')}")
            if control.is_running(cluster.control_socket):
                state = control.request(cluster.control_socket, "status")
                if state["phase"] == "ready":
                    return
                if state["phase"] == "failed":
                    stop_supervisor(cluster)
                    raise SetupError(f"{state['error']} (logs: {cluster.path / 'log'})")
                waiting = [child["id"] for child in state["processes"] if child["state"] != "running"]
                spinner.update(f"kvfs: starting ({', '.join(waiting) or 'chains'})")
            time.sleep(0.05)
    stop_supervisor(cluster)
    raise SetupError(f"the cluster did not come up within {UP_TIMEOUT_S:.0f} s: see {cluster.path / 'log'}")


def stop_supervisor(cluster: cluster_dir.ClusterDir) -> None:
    control.request(cluster.control_socket, "shutdown")
    deadline_s = time.monotonic() + DOWN_TIMEOUT_S
    while control.is_running(cluster.control_socket):
        if time.monotonic() > deadline_s:
            raise SetupError(f"the cluster did not stop within {DOWN_TIMEOUT_S:.0f} s: see {cluster.log_file('supervisor')}")
        time.sleep(0.05)


@click.command()
@click.argument("directory", type=click.Path(file_okay=False, path_type=Path), required=False)
@click.option("--delete", is_flag=True, help="Also delete the cluster's directory with all its data.")
@click.option("--yes", is_flag=True, help="Do not ask before deleting.")
@common_options
def down(options: Options, directory: Path | None, delete: bool, yes: bool) -> None:
    """Stop a cluster started with `kvfs up`; its data stays."""
    cluster = local_cluster(options, directory)
    if delete and not yes:
        click.confirm(f"Delete {cluster.path} and all data in it?", abort=True)
    was_running = control.is_running(cluster.control_socket)
    if was_running:
        stop_supervisor(cluster)
    elif not delete:
        raise SetupError(f"the cluster in {cluster.path} is not running")
    if delete:
        shutil.rmtree(cluster.path)
    if options.as_json:
        print_json({"stopped": was_running, "deleted": delete, "directory": str(cluster.path)})
    else:
        click.echo(f"{'deleted' if delete else 'stopped'} {cluster.path}")


def local_cluster(options: Options, directory: Path | None = None) -> cluster_dir.ClusterDir:
    if directory is not None:
        return cluster_dir.load(directory.expanduser().resolve())
    found = options.directory()
    if found is None:
        raise SetupError("this command needs a directory made by `kvfs up` (--cluster DIR): processes elsewhere are their own supervisors'")
    return found


def one_process(options: Options, command: str, name: str) -> None:
    reply = control.request(local_cluster(options).control_socket, command, name=name, timeout_s=UP_TIMEOUT_S)
    if options.as_json:
        print_json(reply["process"])
    else:
        click.echo(f"{name}: {reply['process']['state']}")


@click.command()
@click.argument("name")
@common_options
def start(options: Options, name: str) -> None:
    """Start one process of the cluster (NAME as `kvfs status` shows it) and wait until it serves."""
    one_process(options, "start", name)


@click.command()
@click.argument("name")
@common_options
def stop(options: Options, name: str) -> None:
    """Stop one process of the cluster and keep it stopped until `kvfs start`."""
    one_process(options, "stop", name)


@click.command(hidden=True)
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--no-restart", is_flag=True)
def supervise(directory: Path, no_restart: bool) -> None:
    """Run the supervisor of a cluster directory in the foreground."""
    process.configure_logging()
    cluster = guarded(cluster_dir.load)(directory)

    async def chains() -> None:
        await bring_up(cluster)

    sys.exit(run_supervisor(cluster, restart=not no_restart, bring_up=chains, stay_when_failed=True))
