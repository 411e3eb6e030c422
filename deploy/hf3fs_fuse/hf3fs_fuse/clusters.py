"""From a kvfs mount to a native client of its cluster.

Owns the process's clients, one a cluster, made when first needed and closed at exit (by kvfs.client). What is mounted is read from
/proc/self/mountinfo each time, so that a mount that came or went meanwhile is seen; how to get to the cluster, the mount says itself
(`user.kvfs.cluster`). It never looks into a mount but for that.
"""

from __future__ import annotations

import errno
import json
import os
import threading

from kvfs.client import Client, ClusterAddress
from kvfs.fuse import kernel
from kvfs.fuse.kernel import MountEntry

CLUSTER_ATTRIBUTE = "user.kvfs.cluster"

_lock = threading.Lock()
os.register_at_fork(after_in_child=lambda: _renew_lock())
_clients: dict[str, Client] = {}


def mount_over(path: str | os.PathLike[str]) -> MountEntry | None:
    """The kvfs mount that a path lies on, whether or not there is something; None: it lies elsewhere."""
    real = os.path.realpath(path)
    found: MountEntry | None = None
    for entry in kernel.mounts():  # oldest first: of two on one directory the later one counts
        above = entry.mount_point.rstrip("/") + "/"
        if (real + "/").startswith(above) and (found is None or len(entry.mount_point) >= len(found.mount_point)):
            found = entry
    return found if found is not None and found.type == kernel.FILE_SYSTEM_TYPE else None


def mount_of_device(device: int) -> MountEntry | None:
    """The kvfs mount with this st_dev."""
    for entry in kernel.mounts():
        if entry.type == kernel.FILE_SYSTEM_TYPE and os.makedev(0, entry.device_minor) == device:
            return entry
    return None


def client_of(mount: MountEntry) -> Client:
    """The process's client of the cluster mounted there (all its mounts share it: the source names the cluster)."""
    with _lock:
        client = _clients.get(mount.source)
        if client is None:
            client = _clients[mount.source] = Client(_address(mount), description=f"hf3fs_fuse on {mount.mount_point}")
        return client


def _renew_lock() -> None:
    """It may have been held by a thread that a forked child does not have. Clients themselves know of forks."""
    global _lock
    _lock = threading.Lock()


def _address(mount: MountEntry) -> ClusterAddress:
    try:
        told = json.loads(os.getxattr(mount.mount_point, CLUSTER_ATTRIBUTE))
    except OSError as error:
        why = f"the mount {mount.mount_point} does not say which cluster it is of ({CLUSTER_ATTRIBUTE}: {error.strerror})"
        raise OSError(error.errno or errno.EIO, why) from error
    return ClusterAddress(tuple(told["managers"]), told["cluster_id"])
