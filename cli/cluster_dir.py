"""The directory of a cluster made by `kvfs up DIR`: what is remembered between runs.

    DIR/cluster.json    cluster id, manager addresses, sizes (also read by the native client, client/locate.py)
    DIR/etc/*.toml      one configuration file a process; written once, then the operator's to edit
    DIR/manager DIR/meta DIR/storage-N    data
    DIR/log/*.log       what each process says
    DIR/run/            sockets of the running cluster (elsewhere, when DIR is too long for a socket's address)

Invariants: cluster.json is the first file of a new directory, is replaced atomically and never rewritten by a plain start; an existing directory is
only ever completed, not changed. So one whose making was cut short, by a kill or a loss of power, is completed by the next start.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import socket
import tempfile
import uuid
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from kvfs.common import config as configuration
from kvfs.common.errors import AddressInUse, ClusterNotFound, FormatTooNew, WrongDataDirectory
from kvfs.meta.cluster.config import ManagerConfig
from kvfs.meta.config import MetaConfig
from kvfs.storage.config import StorageConfig

FORMAT = 1
SOCKET_PATH_MAX = 90  # sun_path holds 107 bytes; leave room for the longest file name below run/
PORTS = (20000, 32000)


def default_directory() -> Path:
    """Where `kvfs up` without a directory keeps its cluster: $XDG_DATA_HOME/kvfs or ~/.local/share/kvfs."""
    base = os.environ.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
    return Path(base) / "kvfs" / "cluster"


@dataclass(frozen=True, slots=True)
class ClusterDir:
    """One remembered cluster. Ports are fixed at creation so that the addresses in cluster.json stay true."""

    path: Path
    cluster_id: str
    managers: tuple[str, ...]
    storage: int
    replicas: int
    manager_port: int
    meta_port: int
    mount: str | None = None
    chunk_size_bytes: int = 1 << 20
    lease_ms: int = 2000
    format: int = FORMAT

    @property
    def run_dir(self) -> Path:
        inside = self.path / "run"
        if len(os.fsencode(inside)) <= SOCKET_PATH_MAX:
            return inside
        digest = hashlib.sha256(os.fsencode(self.path)).hexdigest()[:16]
        return Path(tempfile.gettempdir()) / f"kvfs-{os.getuid()}-{digest}"

    @property
    def control_socket(self) -> Path:
        return self.run_dir / "control.sock"

    def log_file(self, name: str) -> Path:
        return self.path / "log" / f"{name}.log"

    def config_file(self, name: str) -> Path:
        return self.path / "etc" / f"{name}.toml"

    def storage_names(self) -> list[str]:
        return [f"storage-{number}" for number in range(1, self.storage + 1)]

    def save(self) -> None:
        """Atomically: a torn cluster.json would lose the cluster's name."""
        values = asdict(self)
        values["path"] = str(self.path)
        _write_durably(self.path / "cluster.json", json.dumps(values, indent=2) + "\n")

    def with_mount(self, mount: str | None) -> ClusterDir:
        return replace(self, mount=mount)


def is_cluster_dir(path: Path) -> bool:
    return (path / "cluster.json").is_file()


def load(path: Path) -> ClusterDir:
    """Raises ClusterNotFound, WrongDataDirectory (not such a file) or FormatTooNew."""
    file = path / "cluster.json"
    try:
        values = json.loads(file.read_text())
    except FileNotFoundError:
        raise ClusterNotFound(f"no cluster in {path}: make one with `kvfs up {path}`, or name another with --cluster or KVFS_CLUSTER") from None
    except (OSError, ValueError) as error:
        raise WrongDataDirectory(f"{file} cannot be read ({error}): restore it from a backup, nothing was touched") from None
    if not isinstance(values, dict) or "cluster_id" not in values:
        raise WrongDataDirectory(f"{file} is not a cluster's file: name another directory")
    if int(values.get("format", 0)) > FORMAT:
        raise FormatTooNew(f"{file} was written by a newer kvfs (format {values['format']}, this one knows {FORMAT}): upgrade kvfs")
    known = ClusterDir.__dataclass_fields__
    return ClusterDir(**{**{key: value for key, value in values.items() if key in known}, "path": path, "managers": tuple(values["managers"])})


def create(path: Path, *, storage: int, replicas: int, mount: str | None, chunk_size_bytes: int, lease_ms: int, base_port: int | None) -> ClusterDir:
    """Make a new cluster's directory. `base_port`: manager there, meta one above; None: two free ports of the loopback."""
    try:
        if path.exists() and any(file.name != "cluster.json.tmp" for file in path.iterdir()):
            raise WrongDataDirectory(f"{path} is not empty and holds no cluster.json: name an empty or a new directory")
        missing = [folder for folder in (path, *path.parents) if not folder.exists()]
        path.mkdir(parents=True, exist_ok=True)
        for folder in missing:
            _sync_folder(folder.parent)
    except OSError as error:
        raise _not_writable(path, error) from None
    manager_port, meta_port = (base_port, base_port + 1) if base_port else free_ports(2)
    made = ClusterDir(
        path=path,
        cluster_id=f"kvfs-{uuid.uuid4().hex[:12]}",
        managers=(f"tcp://127.0.0.1:{manager_port}",),
        storage=storage,
        replicas=replicas,
        manager_port=manager_port,
        meta_port=meta_port,
        mount=mount,
        chunk_size_bytes=chunk_size_bytes,
        lease_ms=lease_ms,
    )
    try:
        made.save()
        write_configs(made)
    except OSError as error:
        raise _not_writable(path, error) from None
    return made


def _not_writable(path: Path, error: OSError) -> WrongDataDirectory:
    return WrongDataDirectory(f"no cluster can be made in {path} ({error.filename}: {error.strerror}): name a directory you may write to")


def _write_durably(file: Path, text: str) -> None:
    """After a crash the file holds this or what it held before."""
    temporary = file.with_name(file.name + ".tmp")
    with open(temporary, "w") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    os.replace(temporary, file)
    _sync_folder(file.parent)


def _sync_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


FIRST_STORAGE_NODE = 100
"""storage-N has node id 100 + N by its configuration, so that it gets its targets back even when its data directory was lost."""


def write_configs(cluster: ClusterDir) -> None:
    """The folders and configuration files that are not there yet: what is there is the operator's."""
    for name in ("etc", "log", "run", "manager", "meta"):
        (cluster.path / name).mkdir(exist_ok=True)
    # Also for what was found: whoever made it may have been killed before its name was synced.
    _sync_folder(cluster.path)
    with contextlib.suppress(PermissionError):
        _sync_folder(cluster.path.parent)
    run = cluster.run_dir
    write_config(
        cluster,
        "manager",
        ManagerConfig(data=str(cluster.path / "manager"), listen=cluster.managers, cluster_id=cluster.cluster_id, lease_ms=cluster.lease_ms),
    )
    write_config(
        cluster,
        "meta",
        MetaConfig(
            data=str(cluster.path / "meta"),
            listen=(f"tcp://127.0.0.1:{cluster.meta_port}",),
            cluster_id=cluster.cluster_id,
            managers=cluster.managers,
            chunk_size_bytes=cluster.chunk_size_bytes,
            root_uid=os.getuid(),
            root_gid=os.getgid(),
        ),
    )
    for number, name in enumerate(cluster.storage_names(), start=1):
        data = cluster.path / name
        data.mkdir(exist_ok=True)
        write_config(
            cluster,
            name,
            StorageConfig(
                data=(str(data),),
                listen=("tcp://127.0.0.1:0", f"unix://{run / name}.sock"),
                cluster_id=cluster.cluster_id,
                managers=cluster.managers,
                node_id=FIRST_STORAGE_NODE + number,
            ),
        )


def write_config(cluster: ClusterDir, name: str, config: ManagerConfig | MetaConfig | StorageConfig) -> None:
    """Only the keys that differ from their defaults, so that a better default of a later kvfs counts."""
    file = cluster.config_file(name)
    if not file.exists():
        section = name.partition("-")[0]
        head = f"# kvfs {name}; `kvfs config dump {section}` lists every key with its default\n"
        _write_durably(file, head + configuration.dump(config, section, changed=True))


def free_ports(count: int) -> list[int]:
    """Ports of the loopback that nobody listens on now, below the range from which the kernel takes the ports of outgoing connections: a
    remembered port must still be free at the next start."""
    found: list[int] = []
    for port in random.sample(range(*PORTS), 2000):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            return found
    raise AddressInUse(f"no {count} free ports between {PORTS[0]} and {PORTS[1]} on 127.0.0.1: choose some with --port")
