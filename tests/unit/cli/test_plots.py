"""Curves over time, and the plot where matplotlib is there."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvfs.cli.plots import answer_times, hit_rate_over_time, moving_rate
from kvfs.kvcache.replay import Tally


def tally(hits: list[int]) -> Tally:
    return Tally(requests=len(hits), hit_tokens=sum(hits), input_tokens=10 * len(hits), points=[(100 * n, hit, 10) for n, hit in enumerate(hits)])


def test_the_moving_rate_is_that_of_the_last_requests() -> None:
    assert moving_rate(tally([0, 10, 10, 0]), window=2) == [0.0, 0.5, 1.0, 0.5]
    assert moving_rate(tally([0, 10, 10, 0]), window=10) == [0.0, 0.5, 20 / 30, 0.5]
    assert moving_rate(tally([])) == []


def test_a_plot_is_a_png(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "new" / "plot.png"
    hit_rate_over_time(path, "title", [("one", tally([0, 10, 5])), ("two", tally([1, 2, 3]))])
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_plot_of_times_is_a_png(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    answer_times(tmp_path / "plot.png", "title", [("with", [1.0, 2.0], [0.5]), ("without", [3.0], [])])
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
