"""Mounting itself, without a cluster: as root by mount(2), as anybody else through fusermount3."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

SHAKE_HANDS = """
import encodings.idna, os, socket, subprocess, sys
import trio
from kvfs.common.errors import MountError
from kvfs.fuse import kernel, session

async def main():
    where, uid = sys.argv[1], int(sys.argv[2])
    os.setgroups([])
    os.setgid(uid)
    os.setuid(uid)  # only now: the modules may lie where this user has no access
    with trio.fail_after(30):
        made = await trio.to_thread.run_sync(lambda: session.start(where, source="kvfs#test", allow_other=uid == 0, read_only=False))
        await made.shake_hands(64)
        entry = kernel.mount_entry(where)
        print(entry.type, entry.source, made.minor >= 31, os.get_blocking(made.fd), os.get_inheritable(made.fd))
        kernel.unmount(where, lazy=True)
        made.close()
        try:
            session.start(where + "/nowhere", source="kvfs#test", allow_other=False, read_only=False)
        except MountError as error:
            print("refused")

trio.run(main)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")
@pytest.mark.parametrize("uid", [0, 65534])
def test_mount_and_handshake(tmp_path: Path, uid: int) -> None:
    if not os.path.exists("/dev/fuse") or not shutil.which("fusermount3") or not shutil.which("unshare"):
        pytest.skip("there is no /dev/fuse, fusermount3 or unshare")
    for path in (tmp_path, *tmp_path.parents):
        if Path(tempfile.gettempdir()) in path.parents:
            path.chmod(0o755)
    where = tmp_path / "m"
    where.mkdir()
    os.chown(where, uid, uid)
    # A /dev/fuse that everybody may open, as distributions have it, in a mount namespace of its own.
    device = tmp_path / "fuse"
    os.mknod(device, 0o666 | 0o020000, os.makedev(10, 229))
    device.chmod(0o666)
    command = f'mount --bind {device} /dev/fuse && exec "$0" -c "$1" {where} {uid}'
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", command, sys.executable, SHAKE_HANDS], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n") == ["fuse.kvfs kvfs#test True False False", "refused", ""]
