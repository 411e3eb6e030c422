"""What the mount asks of the system around it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvfs.fuse import kernel


@pytest.mark.parametrize(
    ("user", "text", "may"),
    [
        (0, "", True),
        (1000, "", False),
        (1000, "#user_allow_other\n", False),
        (1000, "mount_max = 10\n user_allow_other \n", True),
        (1000, None, False),
    ],
)
def test_who_may_share_a_mount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, user: int, text: str | None, may: bool) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: user)
    if text is not None:
        (tmp_path / "fuse.conf").write_text(text)
    assert kernel.may_allow_other(tmp_path / "fuse.conf") is may
