"""The real LMCache: its own basic check of remote backends, with our connector, our adapter, and the plain file connector on our mount."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

pytest.importorskip("torch")
pytest.importorskip("lmcache")

if TYPE_CHECKING:
    from tests.cluster.conftest import RealCluster

pytestmark = [pytest.mark.ecosystem, pytest.mark.cluster]

KEYS = 6
COMMON = """\
chunk_size: 256
local_cpu: false
max_local_cpu_size: 0.5
remote_serde: "naive"
"""
PLUGIN = """\
remote_storage_plugins: ["kvfs"]
extra_config:
  remote_storage_plugin.kvfs.module_path: kvfs.kvcache.connectors.lmcache
  remote_storage_plugin.kvfs.class_name: {name}
  save_chunk_meta: {header}
  kvfs_cluster: {cluster}
  kvfs_space: {space}
"""


def basic_check(folder: Path, mode: str, configuration: str, *more: str) -> str:
    """What LMCache's check prints. It exits with 0 whatever it found."""
    file = folder / "lmcache.yaml"
    file.write_text(COMMON + configuration)
    environment = {**os.environ, "LMCACHE_CONFIG_FILE": str(file), "LMCACHE_TRACK_USAGE": "false"}
    command = [sys.executable, "-m", "lmcache.v1.basic_check", "--mode", mode, "--num-keys", str(KEYS), *more]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    return done.stdout + "".join(line + "\n" for line in done.stderr.splitlines() if "INFO" not in line)


def assert_all_passed(report: str) -> None:
    rows = re.findall(r"^\|[^\n]*\| +(\d+)/(\d+) \|", report, re.MULTILINE)
    validations = re.findall(r"Validation[^\n]*?: (\d+)/(\d+)", report)
    assert len(rows) == 4 and len(validations) >= 4, report
    assert all(int(passed) == int(count) == KEYS for passed, count in [*rows, *validations]), report
    assert "mismatch" not in report and "Test Failed" not in report, report


@pytest.mark.parametrize(("name", "header"), [("KvfsConnector", "true"), ("KvfsConnector", "false"), ("KvfsAdapter", "true")])
def test_the_plugin_passes_lmcache_s_check(cluster: RealCluster, tmp_path: Path, name: str, header: str) -> None:
    configuration = PLUGIN.format(name=name, header=header, cluster=cluster.path, space=f"{name}{header}")
    # Without a header only whole chunks can be read; by default the check makes them twice as large as its own configuration says.
    report = basic_check(tmp_path, "test_storage_manager", configuration, *([] if header == "true" else ["--obj-size", "512"]))
    assert_all_passed(report)
    spaces = cluster.kvfs("ls", "/kvcache").stdout.split()
    assert any(space.startswith(f"{name}{header}.") for space in spaces), "it did not go through us"
