"""Plots as PNG files, drawn without a screen. matplotlib is an extra (`plots`) and imported only here, when something is drawn."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from kvfs.common.errors import SetupError
from kvfs.kvcache.replay import Tally

WINDOW_REQUESTS = 40


def check_can_plot() -> None:
    """Before minutes of work are spent. Raises SetupError."""
    if importlib.util.find_spec("matplotlib") is None:
        raise SetupError("matplotlib is not installed: pip install 'kvfs[plots]' (`make demo-kvcache` does), or leave the plot out")


def moving_rate(tally: Tally, window: int = WINDOW_REQUESTS) -> list[float]:
    """Hit rate of the last `window` requests, after each request."""
    rates = []
    hit = asked = 0
    for place, (_, hits, tokens) in enumerate(tally.points):
        hit, asked = hit + hits, asked + tokens
        if place >= window:
            _, old_hits, old_tokens = tally.points[place - window]
            hit, asked = hit - old_hits, asked - old_tokens
        rates.append(hit / asked if asked else 0.0)
    return rates


def hit_rate_over_time(path: Path, title: str, lines: Sequence[tuple[str, Tally]]) -> None:
    """One line each, over the time of arrival; the legend has the rate over all requests."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(10, 5), layout="constrained")
    styles = ({"linewidth": 2.2}, {"linewidth": 1.4, "linestyle": "--"}, {"linewidth": 1.2, "linestyle": ":"})
    for place, (label, tally) in enumerate(lines):
        seconds = [timestamp_ms / 1000 for timestamp_ms, _, _ in tally.points]
        rates = [100 * rate for rate in moving_rate(tally)]
        axes.plot(seconds, rates, label=f"{label}: {100 * tally.hit_rate:.2f} % over all", **styles[place % len(styles)])
    axes.set(title=title, xlabel="arrival, s", ylabel=f"hit tokens of the last {WINDOW_REQUESTS} requests, %", ylim=(0, 100))
    axes.margins(x=0)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def answer_times(path: Path, title: str, runs: Sequence[tuple[str, Sequence[float], Sequence[float]]]) -> None:
    """For each run, which share of its requests had their first token, and the next ones, within so many milliseconds (both in order)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained", sharey=True)
    for place, (axes, what) in enumerate(zip(panels, ("time to first token, ms", "time per token after it, ms"), strict=True)):
        for label, *times in runs:
            ordered = times[place]
            shares = [100 * (number + 1) / len(ordered) for number in range(len(ordered))]
            axes.plot(ordered, shares, label=label, drawstyle="steps-post")
        axes.set(xlabel=what, xscale="log")
        axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axes.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_formatter(ticker.NullFormatter())
        axes.grid(alpha=0.3, which="both")
    panels[0].set(ylabel="requests, %", ylim=(0, 100))
    panels[0].legend(loc="upper left")
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
