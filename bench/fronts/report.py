"""The table and the figure of ``bench.fronts.run``.

Legend: S seeds, R rows of the table; 2 objectives.
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from bench.fronts.learned import Run
from bench.fronts.problems import Array, Problem

_INK, _FAINT = "#222222", "#b8b8b8"
_COLOURS = {"weights": "#00798c", "scores": "#d1495b", "gradients": "#8f5fbf", "thresholds": "#c98600"}
_MARKERS = "osD^vP<>X*hdp8H"


@dataclass(frozen=True)
class Ends:
    """Where one combiner's policies ended, one for each seed."""

    combiner: str
    family: str  # one of the colours
    problem: Problem
    runs: tuple[Run, ...]

    @property
    def values_S2(self) -> Array:
        """Expected rewards."""
        return np.array([run.values_2 for run in self.runs])

    @property
    def distance(self) -> tuple[float, float]:
        """Mean over the seeds, and its standard error."""
        return _mean_and_error([run.distance for run in self.runs])

    @property
    def from_optimum(self) -> tuple[float, float] | None:
        """Of the distance from the constrained optimum; ``None`` without thresholds."""
        distances = [run.from_optimum for run in self.runs if run.from_optimum is not None]
        return _mean_and_error(distances) if distances else None

    def numbers(self) -> dict[str, Any]:
        """A row of the CSV file."""
        mean_2, spread_2 = self.values_S2.mean(0), self.values_S2.std(0)
        optimum = self.from_optimum or (None, None)
        return {
            "problem": self.problem.name,
            "combiner": self.combiner,
            "distance": self.distance[0],
            "distance_error": self.distance[1],
            "first": mean_2[0],
            "second": mean_2[1],
            "first_spread": spread_2[0],
            "second_spread": spread_2[1],
            "from_optimum": optimum[0],
            "from_optimum_error": optimum[1],
        }


def _mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    error = float(np.std(values, ddof=1)) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return float(np.mean(values)), error


def print_table(rows: Sequence[Ends]) -> None:
    """The table of one problem."""
    problem = rows[0].problem
    first, second = problem.constrained
    print(
        f"\n{problem.name}: {problem.says}. Threshold {problem.threshold:g} for the second objective: the optimum "
        f"is ({first:.3f}, {second:.3f}).\n"
        f"{'combiner':26}{'distance':>12}{'+-':>8}{'first':>10}{'+-':>7}{'second':>10}{'+-':>7}"
        f"{'from optimum':>15}{'+-':>8}"
    )
    for row in rows:
        n = row.numbers()
        optimum = "" if row.from_optimum is None else f"{n['from_optimum']:15.4f}{n['from_optimum_error']:8.4f}"
        print(
            f"{row.combiner:26}{n['distance']:12.4f}{n['distance_error']:8.4f}{n['first']:10.3f}"
            f"{n['first_spread']:7.3f}{n['second']:10.3f}{n['second_spread']:7.3f}{optimum}",
            flush=True,
        )


def runs_of(row: Ends) -> list[dict[str, Any]]:
    """A row of the CSV file for each seed."""
    return [
        {
            "problem": row.problem.name,
            "combiner": row.combiner,
            "seed": seed,
            "first": run.values_2[0],
            "second": run.values_2[1],
            "distance": run.distance,
            "from_optimum": run.from_optimum,
        }
        for seed, run in enumerate(row.runs)
    ]


def write_csv(numbers: Sequence[dict[str, Any]], file: Path) -> None:
    """All rows."""
    with file.open("w", encoding="utf-8", newline="") as opened:
        writer = csv.DictWriter(opened, list(numbers[0]))
        writer.writeheader()
        writer.writerows(numbers)


def draw(rows: Sequence[Ends], file: Path) -> None:
    """Above, each problem's front and all end points; below, a row for each combiner, which is the legend too."""
    problems = list(dict.fromkeys(row.problem for row in rows))
    order = sorted(rows, key=lambda row: list(_COLOURS).index(row.family))
    names = list(dict.fromkeys(row.combiner for row in order))
    styles = {}
    for family, colour in _COLOURS.items():
        members = list(dict.fromkeys(row.combiner for row in order if row.family == family))
        styles |= {name: (colour, _MARKERS[i % len(_MARKERS)]) for i, name in enumerate(members)}
    figure = Figure(figsize=(5.4 * len(problems) + 1, 5 + 0.24 * len(names)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 2 * len(problems), height_ratios=[4.4, 0.24 * len(names)])
    for column, problem in enumerate(problems):
        here = [row for row in order if row.problem is problem]
        _draw_front(figure.add_subplot(grid[0, 2 * column : 2 * column + 2]), problem, here, styles)
        places = figure.add_subplot(grid[1, 2 * column])
        _draw_rows(places, names, styles, labelled=column == 0)
        _draw_places(places, problem, here, names, styles)
        distances = figure.add_subplot(grid[1, 2 * column + 1])
        _draw_rows(distances, names, styles, labelled=False)
        _draw_distances(distances, here, names, styles)
    figure.savefig(file, dpi=110)


def _draw_front(axes: Axes, problem: Problem, rows: Sequence[Ends], styles: dict[str, tuple[str, str]]) -> None:
    front = problem.front
    axes.plot(
        front[:, 0], front[:, 1], color=_FAINT, linewidth=4, solid_capstyle="round", zorder=1, label="exact front"
    )
    optimum_2 = problem.constrained
    label = f"constrained optimum (second ≥ {problem.threshold:g})"
    axes.scatter(*optimum_2, s=260, facecolors="none", edgecolors=_INK, linewidths=1.2, zorder=2, label=label)
    for row in rows:
        colour, marker = styles[row.combiner]
        values_S2 = row.values_S2
        style = {"s": 34, "marker": marker, "color": colour, "alpha": 0.75, "linewidths": 0.4, "edgecolors": "white"}
        axes.scatter(values_S2[:, 0], values_S2[:, 1], zorder=3, **style)
    axes.set_xlim(-0.03, 1.05)
    axes.set_ylim(-0.03, 1.05)
    axes.set_aspect("equal")
    axes.set_xlabel("first objective")
    axes.set_ylabel("second objective")
    axes.set_title(f"{problem.name}\n{problem.says}", fontsize=10)
    axes.legend(loc="upper right", fontsize=7.5, frameon=False, markerscale=0.5)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_rows(axes: Axes, names: Sequence[str], styles: dict[str, tuple[str, str]], labelled: bool) -> None:
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_yticks(range(len(names)), names if labelled else [""] * len(names), fontsize=8.5)
    for tick, name in zip(axes.get_yticklabels(), names, strict=True):
        tick.set_color(styles[name][0])
    axes.grid(color=_FAINT, linewidth=0.4, alpha=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _draw_places(
    axes: Axes, problem: Problem, rows: Sequence[Ends], names: Sequence[str], styles: dict[str, tuple[str, str]]
) -> None:
    for row in rows:
        colour, marker = styles[row.combiner]
        height = names.index(row.combiner)
        first_S = row.values_S2[:, 0]
        axes.scatter(first_S, [height] * len(first_S), s=30, marker=marker, color=colour, alpha=0.7, linewidths=0)
        if row.from_optimum is not None:
            axes.scatter(problem.constrained[0], height, s=90, marker="|", color=_INK, linewidths=1.2, zorder=4)
    axes.set_xlim(-0.05, 1.05)
    axes.set_xlabel("first objective, each seed\n(| the constrained optimum)", fontsize=9)


def _draw_distances(axes: Axes, rows: Sequence[Ends], names: Sequence[str], styles: dict[str, tuple[str, str]]) -> None:
    least = 1e-4  # of the axis; smaller distances stand at its edge
    for row in rows:
        colour, marker = styles[row.combiner]
        height = names.index(row.combiner)
        mean, error = row.distance
        ends = np.clip([mean - error, mean + error], least, None)
        axes.plot(ends, [height, height], color=colour, linewidth=1.5, zorder=2)
        axes.scatter(max(mean, least), height, s=42, marker=marker, color=colour, zorder=3, clip_on=False)
    axes.set_xscale("log")
    axes.set_xlim(least, 1)
    axes.set_xlabel("distance from the front,\nmean and standard error", fontsize=9)
