"""The picture of the demo: the exact front, what each run was asked for, and what it reached."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from moa_lightning.commands.demo.runs import INFORMATIVE, SENTIMENT, Reached, nearest
from moa_lightning.data.reviews import front
from moa_lightning.functional.verdict import Z
from moa_lightning.utils.atomic_file import atomic_file

_INK, _FAINT = "#222222", "#9a9a9a"
_COLORS = ("#d1495b", "#00798c", "#edae49", "#66a182", "#8f5d9b", "#2e4057", "#c07f4f")


def draw(runs: Sequence[Reached], file: Path) -> None:
    """Draw the runs in the plane of both objectives, 700 pixels wide; the file appears at once, complete."""
    figure = Figure(figsize=(7, 4.9), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    f = np.linspace(0, 1, 200)
    best = [front(x) for x in f]
    axes.plot(f, best, color=_INK, linewidth=1.6, label=f"exact front: {SENTIMENT} = 1 − {INFORMATIVE}²")
    axes.fill_between(f, best, 1.08, color=_FAINT, alpha=0.15, linewidth=0)
    for run, color in zip(runs, _COLORS, strict=False):
        _draw_run(axes, run, color, nearest(run, runs).end.informative)
    start = runs[0].path[0]
    axes.plot(start.informative, start.sentiment, "s", color=_INK, markersize=7, label="start, before training")
    axes.plot([], [], "o", color=_INK, label="end of a run, with its 95 % interval")
    axes.plot([], [], "o", color=_INK, markerfacecolor="none", label="best possible for what it was asked")
    axes.set(xlabel=f"{INFORMATIVE} (mean)", ylabel=f"{SENTIMENT} (mean)", xlim=(-0.02, 1.02), ylim=(-0.12, 1.08))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper right", frameon=False)
    with atomic_file(file) as scratch:
        figure.savefig(scratch, format="png", pil_kwargs={"optimize": True})


def _draw_run(axes: Any, run: Reached, color: str, beside: float) -> None:
    """``beside`` is informative at the nearest other end: the name stands on the other side."""
    path, end, asked = run.path, run.end, run.asked
    axes.plot([p.informative for p in path], [p.sentiment for p in path], color=color, alpha=0.45, linewidth=1.2)
    axes.errorbar(
        end.informative,
        end.sentiment,
        xerr=Z * end.informative_error,
        yerr=Z * end.sentiment_error,
        fmt="o",
        color=color,
        markersize=7,
        zorder=4,
    )
    to_the_left = 0.3 < end.informative < beside
    axes.annotate(
        asked.name,
        (end.informative, end.sentiment),
        xytext=(-9 if to_the_left else 9, -14),
        textcoords="offset points",
        ha="right" if to_the_left else "left",
        color=color,
        weight="bold",
        zorder=5,
        path_effects=[withStroke(linewidth=3, foreground="white")],
    )
    if asked.threshold is not None:
        axes.vlines(asked.threshold, -1, front(asked.threshold), color=color, linewidth=1.2, linestyle=":", zorder=1)
        axes.annotate(asked.words, (asked.threshold, 0.0), xytext=(4, 0), textcoords="offset points", color=color)
    if (best := asked.best) is not None:
        axes.plot(best, front(best), "o", color=color, markerfacecolor="white", markersize=8, zorder=3)
        axes.plot([best, end.informative], [front(best), end.sentiment], color=color, linewidth=0.8, linestyle="--")
