"""The directory of a cluster: one whose making was cut short is completed by the next start, whatever had been made of it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from kvfs.cli import cluster_dir, up
from kvfs.common.errors import WrongDataDirectory


class Killed(BaseException):
    pass


def make(path: Path) -> cluster_dir.ClusterDir:
    return up.prepare(path, 2, 2, None, 1 << 20, 2000, 21000)


def names(path: Path) -> list[str]:
    return sorted(str(file.relative_to(path)) for file in path.rglob("*"))


def test_a_cluster_whose_making_was_killed_is_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = names(make(tmp_path / "whole").path)
    step = 0
    reached = False
    while not reached:
        step += 1
        left = step

        def counted(real: Any) -> Any:
            def call(*args: Any, **more: Any) -> Any:
                nonlocal left
                left -= 1
                if not left:
                    raise Killed
                return real(*args, **more)

            return call

        path = tmp_path / "cut"
        with monkeypatch.context() as patched:
            for name in ("mkdir", "fsync", "replace"):
                patched.setattr(os, name, counted(getattr(os, name)))
            try:
                make(path)
                reached = True
            except Killed:
                pass
        made = make(path)
        assert names(path) == whole, step
        assert cluster_dir.load(path) == made
        assert all(file.stat().st_size for file in path.rglob("*.toml"))
        shutil.rmtree(path)
    assert step > 10


def test_somebody_elses_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("do not lose me")
    with pytest.raises(WrongDataDirectory, match="not empty"):
        make(tmp_path)
    assert names(tmp_path) == ["thesis.tex"]
