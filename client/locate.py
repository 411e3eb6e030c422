"""From what a person types after --cluster to the managers' addresses.

Owns the two forms: a directory made by `kvfs up` (its cluster.json), or manager addresses "host:port,host:port" (also with "tcp://" or "unix://").
It reads that one file and nothing else, and never connects.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from kvfs.common.errors import ClusterNotFound

CLUSTER_FILE = "cluster.json"
ENVIRONMENT = "KVFS_CLUSTER"


@dataclass(frozen=True, slots=True)
class ClusterAddress:
    managers: tuple[str, ...]
    cluster_id: str = ""
    """Empty when only addresses were given: learnt from the manager."""
    directory: Path | None = None


def locate(cluster: str | os.PathLike[str] | None = None, environ: Mapping[str, str] = os.environ) -> ClusterAddress:
    """Where the cluster is; without an argument, what KVFS_CLUSTER says. ClusterNotFound names what to do."""
    text = os.fspath(cluster) if cluster else environ.get(ENVIRONMENT, "")
    if not text:
        raise ClusterNotFound(f"no cluster named: give --cluster (a directory made by `kvfs up`, or host:port of a manager) or set {ENVIRONMENT}")
    path = Path(text)
    if path.is_dir():
        return _from_directory(path)
    if path.name == CLUSTER_FILE and path.is_file():
        return _from_directory(path.parent)
    if os.sep in text and "://" not in text:
        raise ClusterNotFound(f"{text}: no such directory; `kvfs up {text}` makes a cluster there")
    return ClusterAddress(tuple(_address(part.strip()) for part in text.split(",") if part.strip()))


def _from_directory(path: Path) -> ClusterAddress:
    file = path / CLUSTER_FILE
    try:
        content = json.loads(file.read_text())
        managers = tuple(str(address) for address in content["managers"])
        cluster_id = str(content["cluster_id"])
    except FileNotFoundError:
        raise ClusterNotFound(f"{path}: no {CLUSTER_FILE} there; `kvfs up {path}` makes a cluster") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ClusterNotFound(f"{file}: not a cluster description ({error})") from None
    if not managers:
        raise ClusterNotFound(f"{file}: names no manager")
    return ClusterAddress(managers, cluster_id, path)


def _address(text: str) -> str:
    if "://" in text:
        return text
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ClusterNotFound(f"{text!r} is neither a directory nor host:port of a manager")
    return f"tcp://{text}"
