"""Charts of replays, as PNG files."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes

from baton.errors import InvalidRequest
from simulator.report import Report

matplotlib.use("Agg")
from matplotlib import pyplot


def plot_reports(path: Path, reports: Sequence[Report], title: str) -> None:
    """How time to first token is distributed under each policy, and beside it mean and p99.

    Raises InvalidRequest if the file cannot be written.
    """
    figure, (curves, means, p99s) = pyplot.subplots(
        1, 3, figsize=(14, 5), width_ratios=(3, 1.3, 1.3), layout="constrained"
    )
    try:
        figure.suptitle(title)
        plot_curves(curves, reports)
        plot_bars(means, reports, "mean", [report.ttft_s.mean for report in reports])
        plot_bars(p99s, reports, "p99", [report.ttft_s.p99 for report in reports])
        p99s.tick_params(labelleft=False)
        figure.savefig(path, format="png", dpi=120)
    except OSError as error:
        raise InvalidRequest(f"The chart {path} cannot be written: {error.strerror}.") from None
    finally:
        pyplot.close(figure)


def plot_curves(axes: Axes, reports: Sequence[Report]) -> None:
    for report in reports:
        if report.ttfts_s:
            shares = np.arange(1, len(report.ttfts_s) + 1) / len(report.ttfts_s)
            axes.step(report.ttfts_s, shares, where="post", label=report.policy)
    axes.set(xscale="log", xlabel="time to first token, s", ylabel="share of requests", ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")


def plot_bars(axes: Axes, reports: Sequence[Report], name: str, values: Sequence[float]) -> None:
    """In the colours of the curves."""
    colours = [f"C{number}" for number in range(len(reports))]
    bars = axes.barh([report.policy for report in reports], values, color=colours)
    axes.bar_label(bars, fmt="%.3g", padding=3)
    axes.set(xlabel=f"{name}, s")
    axes.invert_yaxis()
    axes.margins(x=0.2)
