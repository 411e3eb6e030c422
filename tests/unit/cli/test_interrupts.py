"""Ctrl-C at any moment of a command: status 130, no traceback."""

from __future__ import annotations

import subprocess
import sys

import pytest

COMMAND = """
import os, signal, sys
wanted = sys.argv[1]
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == wanted:
            os.kill(os.getpid(), signal.SIGINT)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a test that runs in the background of a shell inherits that it is ignored
sys.meta_path.insert(0, Finder())
from kvfs.cli.main import main
sys.argv[:] = ["kvfs", *sys.argv[2:]]
main()
"""


@pytest.mark.parametrize("module", ["click", "kvfs.cli.context", "kvfs.cli.files", "kvfs.client.async_client"])
def test_while_a_module_is_imported(module: str) -> None:
    # A shell says 130 of a program that ended by the signal itself, too.
    done = subprocess.run(
        ["sh", "-c", '"$@"; exit $?', "sh", sys.executable, "-c", COMMAND, module, "ls", "/"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 130, done.stderr
    assert done.stdout == "" and "Traceback" not in done.stderr and "Aborted" not in done.stderr
