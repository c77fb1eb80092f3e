"""The picture of ``moa compare``."""

import math
from itertools import combinations
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from moa_lightning.commands.compare.reached import Reached
from moa_lightning.utils.atomic_file import atomic_file

_INK, _FAINT, _FRONT = "#222222", "#b8b8b8", "#d1495b"
_COLORS = ("#00798c", "#edae49", "#8f5d9b", "#66a182", "#d1495b", "#2e4057", "#c07f4f")
_MARKERS = "osD^vP"


def draw_comparison(found: list[Reached], names: list[str], on_front: list[bool], file: Path) -> None:
    """Write :func:`comparison` as a picture."""
    with atomic_file(file) as scratch:
        comparison(found, names, on_front).savefig(scratch, format="png")


def comparison(found: list[Reached], names: list[str], on_front: list[bool]) -> Figure:
    """The ends of runs with their 95 % intervals, one panel for each pair of objectives.

    Runs whose objectives are in other units have panels of their own. The legend names the runs, which may lie close
    together.
    """
    panels = [
        (a, b, units)
        for a, b in list(combinations(names, 2)) or [(names[0], names[0])]
        for units in dict.fromkeys((_unit(run, a), _unit(run, b)) for run in found if _is_known(run, a, b))
    ]
    columns = max(min(len(panels), 3), 1)
    rows = (len(panels) + columns - 1) // columns
    lines = (len(found) + columns - 1) // columns
    figure = Figure(figsize=(6.4 * columns, 4.8 * rows + 0.25 * lines), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle("Runs at their end, with 95 % intervals", color=_INK)
    for index, (a, b, units) in enumerate(panels):
        _panel(figure.add_subplot(rows, columns, index + 1), found, on_front, a, b, units)
    short = [Path(run.run).name for run in found]
    labels = short if len(set(short)) == len(short) else [run.run for run in found]
    handles = [
        Line2D([], [], color=_color(i), marker=_marker(i), linestyle="", label=label.replace("$", r"\$"))
        for i, label in enumerate(labels)
    ]
    ring: dict[str, Any] = {
        "marker": "o",
        "markersize": 11,
        "markerfacecolor": "none",
        "markeredgecolor": _FRONT,
        "linestyle": "",
    }
    if any(on_front):
        handles.append(Line2D([], [], label="no other run dominates it", **ring))
    if any(run.thresholds for run in found):
        handles.append(Line2D([], [], color=_INK, linestyle=":", label="threshold"))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=9, frameon=False)
    return figure


def _unit(run: Reached, name: str) -> str:
    return run.transform[name] or "raw"


def _is_known(run: Reached, a: str, b: str) -> bool:
    """False for an old run whose values are not known."""
    return not math.isnan(run.mean[a] + run.mean[b])


def _color(run: int) -> str:
    return _COLORS[run % len(_COLORS)]


def _marker(run: int) -> str:
    return _MARKERS[run // len(_COLORS) % len(_MARKERS)]


def _panel(axes: Any, found: list[Reached], on_front: list[bool], a: str, b: str, units: tuple[str, str]) -> None:
    shown = [i for i, run in enumerate(found) if _is_known(run, a, b) and (_unit(run, a), _unit(run, b)) == units]
    for i in shown:
        run = found[i]
        x, y = run.mean[a], run.mean[b]
        style = {"fmt": _marker(i), "color": _color(i), "ecolor": _FAINT, "zorder": 3}
        axes.errorbar(x, y, xerr=run.interval[a], yerr=run.interval[b], **style)
        if on_front[i]:
            axes.scatter([x], [y], s=130, facecolors="none", edgecolors=_FRONT, linewidths=1.8, zorder=4)
    for name, line in ((a, axes.axvline), (b, axes.axhline)):
        of = {i: found[i].thresholds[name] for i in shown if name in found[i].thresholds}
        for threshold in sorted({*of.values()}):
            asking = [i for i, asked in of.items() if asked == threshold]
            color = _color(asking[0]) if len(asking) == 1 < len(shown) else _INK  # one run's, or several runs'
            line(threshold, color=color, linewidth=1, linestyle=":", zorder=1)
    axes.set_xlabel(_label(a, units[0]))
    axes.set_ylabel(_label(b, units[1]))
    axes.margins(0.15)
    axes.spines[["top", "right"]].set_visible(False)


def _label(name: str, unit: str) -> str:
    return (name if unit == "raw" else f"{name} (value, {unit})").replace("$", r"\$")
