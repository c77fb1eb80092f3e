"""The picture of ``moa compare``."""

import math
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from moa_lightning.commands.compare import Reached

_INK, _FAINT, _FRONT = "#222222", "#b8b8b8", "#d1495b"
_COLORS = ("#00798c", "#edae49", "#8f5d9b", "#66a182", "#d1495b", "#2e4057", "#c07f4f")


def draw_comparison(found: "list[Reached]", names: list[str], on_front: list[bool], file: Path) -> None:
    """Draw the ends of runs with their 95 % intervals, one panel for each pair of objectives."""
    pairs = list(combinations(names, 2)) or [(names[0], names[0])]
    columns = min(len(pairs), 3)
    rows = (len(pairs) + columns - 1) // columns
    figure = Figure(figsize=(6.4 * columns, 4.8 * rows), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle("Runs at their end, with 95 % intervals", color=_INK)
    short = [Path(run.run).name for run in found]
    labels = short if len(set(short)) == len(short) else [run.run for run in found]
    for index, (a, b) in enumerate(pairs):
        _panel(figure.add_subplot(rows, columns, index + 1), found, labels, on_front, a, b)
    figure.savefig(file, format="png")


def _label(found: "list[Reached]", name: str) -> str:
    units = sorted({run.transform[name] or "raw" for run in found})
    return name if units == ["raw"] else f"{name} (value, {' or '.join(units)})"


def _panel(axes: Any, found: "list[Reached]", labels: list[str], on_front: list[bool], a: str, b: str) -> None:
    for i, (run, label, keep) in enumerate(zip(found, labels, on_front, strict=True)):
        color = _COLORS[i % len(_COLORS)]
        x, y = run.mean[a], run.mean[b]
        if math.isnan(x + y):  # an old run whose values are not known
            continue
        axes.errorbar(x, y, xerr=run.interval[a], yerr=run.interval[b], fmt="o", color=color, ecolor=_FAINT, zorder=3)
        axes.annotate(
            label.replace("$", r"\$"), (x, y), xytext=(6, 6), textcoords="offset points", color=color, fontsize=9
        )
        if keep:
            axes.scatter([x], [y], s=130, facecolors="none", edgecolors=_FRONT, linewidths=1.8, zorder=4)
        for name, line in ((a, axes.axvline), (b, axes.axhline)):
            if name in run.thresholds:
                line(run.thresholds[name], color=color, linewidth=1, linestyle=":", zorder=1)
    axes.set_xlabel(_label(found, a))
    axes.set_ylabel(_label(found, b))
    axes.margins(0.15)
    axes.spines[["top", "right"]].set_visible(False)
