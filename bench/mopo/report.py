"""Tables and the figure of the synthetic study.

Legend: M secondary objectives, N objectives, K responses.
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy import stats

from bench.mopo.learned import Learned, total_variation
from bench.mopo.structures import Array, Point, Structure

_INK, _FAINT, _FRONT, _LEARNED, _OUT = "#222222", "#b8b8b8", "#00798c", "#edae49", "#d1495b"


@dataclass(frozen=True)
class Entry:
    """One threshold of one structure: the exact answers, and the trained policies if there are any."""

    structure: Structure
    thresholds_M: Array
    exact: Point  # the general convex solver's
    mopo: Point
    learned: list[Learned] = field(default_factory=list)  # one for each seed

    @property
    def distance(self) -> float:
        """Euclidean, between the two exact answers in the space of the N objectives' values."""
        return float(np.linalg.norm(self.exact.values_N - self.mopo.values_N))

    @property
    def learned_SN(self) -> Array:
        """True values of the trained policies, one row for each seed."""
        return np.array([policy.policy_K @ self.structure.wins_KN.numpy() for policy in self.learned])

    @property
    def error_N(self) -> Array:
        """Half the width of the 95 % interval (Student's t) of the mean over the seeds."""
        seeds = len(self.learned)
        return stats.t.ppf(0.975, seeds - 1) * self.learned_SN.std(0, ddof=1) / np.sqrt(seeds)

    @property
    def inside_N(self) -> Array:
        """Whether the exact value lies within that interval, for each objective."""
        return np.abs(self.learned_SN.mean(0) - self.exact.values_N) <= self.error_N

    def numbers(self) -> dict[str, Any]:
        """A row of the CSV file."""
        names = list(self.structure.wins)
        row: dict[str, Any] = {"structure": self.structure.name, "feasible": self.exact.feasible}
        row |= {f"threshold/{n}": float(b) for n, b in zip(names[1:], self.thresholds_M, strict=True)}
        for who, point in (("exact", self.exact), ("mopo", self.mopo)):
            row |= {f"{who}/{n}": float(v) for n, v in zip(names, point.values_N, strict=True)}
            row[f"{who}/objective"] = point.objective
        row["distance"] = self.distance
        row["total_variation"] = total_variation(self.exact.policy_K, self.mopo.policy_K)
        if self.learned:
            for i, name in enumerate(names):
                row[f"learned/{name}"] = float(self.learned_SN[:, i].mean())
                row[f"learned_error/{name}"] = float(self.error_N[i])
                row[f"inside/{name}"] = bool(self.inside_N[i])
            variations = [total_variation(policy.policy_K, self.exact.policy_K) for policy in self.learned]
            row["learned_total_variation"] = float(np.mean(variations))
            row["learned_outside"] = max(policy.outside for policy in self.learned)
        return row


def print_exact(entries: Sequence[Entry]) -> None:
    """One line for each structure: how far MOPO's points are from the solver's."""
    print(f"{'structure':20}{'thresholds':>11}{'feasible':>9}{'agree':>7}{'distance':>11}{'TV':>10}{'objective':>11}")
    for _, group in groupby(entries, key=lambda entry: entry.structure.name):
        rows = list(group)
        feasible = [entry for entry in rows if entry.exact.feasible]
        agree = sum(entry.exact.feasible == entry.mopo.feasible for entry in rows)
        variation = max(total_variation(entry.exact.policy_K, entry.mopo.policy_K) for entry in feasible)
        objective = max(abs(entry.exact.objective - entry.mopo.objective) for entry in feasible)
        print(
            f"{rows[0].structure.name:20}{len(rows):>11}{len(feasible):>9}{agree:>7}"
            f"{max(entry.distance for entry in feasible):>11.1e}{variation:>10.1e}{objective:>11.1e}"
        )


def print_learned(entries: Sequence[Entry]) -> None:
    """One line for each threshold that policies were trained for."""
    print(
        f"\n{'structure':20}{'objective':>10}{'threshold':>10}{'exact':>8}{'learned':>9}{'+-':>8}{'inside':>8}{'TV':>8}"
        f"{'outside':>9}"
    )
    for entry in entries:
        thresholds = [None, *map(float, entry.thresholds_M)]
        row = entry.numbers()
        for i, name in enumerate(entry.structure.wins):
            threshold = thresholds[i]
            print(
                f"{entry.structure.name if i == 0 else '':20}{name:>10}"
                f"{'' if threshold is None else f'{threshold:.3f}':>10}{entry.exact.values_N[i]:>8.3f}"
                f"{row[f'learned/{name}']:>9.3f}{entry.error_N[i]:>8.3f}{'yes' if entry.inside_N[i] else 'NO':>8}"
                + (f"{row['learned_total_variation']:>8.3f}{row['learned_outside']:>9.3f}" if i == 0 else "")
            )
    inside = np.concatenate([entry.inside_N for entry in entries])
    gap = max(np.abs(entry.learned_SN.mean(0) - entry.exact.values_N).max() for entry in entries)
    print(
        f"\nThe exact value lies within the 95 % interval in {inside.sum()} of {len(inside)} cases "
        f"({0.95 * len(inside):.0f} expected if sampling were the only error); the means are off by at most {gap:.4f}."
    )


def write_csv(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """All columns that any row has."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    with file.open("w", newline="", encoding="utf-8") as opened:
        writer = csv.DictWriter(opened, names)
        writer.writeheader()
        writer.writerows(rows)


def draw(sweeps: dict[str, list[Entry]], trained: dict[str, list[Entry]], file: Path) -> None:
    """A panel for each structure: the exact front, MOPO's points on it and what was learned; below it the errors."""
    columns = 4
    bands = -(-(len(sweeps) + 1) // columns)
    figure = Figure(figsize=(4.1 * columns, 4.9 * bands), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)  # no pyplot: it would choose a backend for the whole process
    grid = figure.add_gridspec(2 * bands, columns, height_ratios=[3, 1] * bands)
    handles: dict[str, Any] = {}
    for index, (name, entries) in enumerate(sweeps.items()):
        band, column = divmod(index, columns)
        above, below = figure.add_subplot(grid[2 * band, column]), figure.add_subplot(grid[2 * band + 1, column])
        _panel(above, entries, trained.get(name, []))
        _errors(below, trained.get(name, []))
        for axes in (above, below):
            handles |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    band, column = divmod(len(sweeps), columns)
    legend = figure.add_subplot(grid[2 * band, column])
    legend.axis("off")
    legend.legend(handles.values(), handles.keys(), loc="center", frameon=False, fontsize=10)
    figure.savefig(file)


def _errors(axes: Any, trained: list[Entry]) -> None:
    """Learned less exact, by threshold and objective; the bars of the panel above are too short to see."""
    axes.axhline(0, color=_OUT, linewidth=1)
    colors = (_LEARNED, _FRONT, "#8d6a9f")
    for i, entry in enumerate(trained):
        difference_N = 1e3 * (entry.learned_SN.mean(0) - entry.exact.values_N)
        for n, name in enumerate(entry.structure.wins):
            axes.errorbar(
                i + 0.16 * (n - 1), difference_N[n], 1e3 * entry.error_N[n], fmt="D", markersize=4, capsize=3,
                color=colors[n], label=f"error in {name}, 95 % interval" if i == 0 else None,
            )  # fmt: skip
    axes.set_xticks(range(len(trained)), [", ".join(f"{b:.2f}" for b in entry.thresholds_M) for entry in trained])
    axes.set_xlim(-0.6, max(len(trained), 1) - 0.4)
    axes.set_xlabel("threshold", fontsize=9)
    axes.set_ylabel("learned \N{MINUS SIGN} exact,\nthousandths", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _panel(axes: Any, sweep: list[Entry], trained: list[Entry]) -> None:
    structure = sweep[0].structure
    feasible = [entry for entry in sweep if entry.exact.feasible]
    wins_KN = structure.wins_KN.numpy()
    axes.scatter(wins_KN[:, 1], wins_KN[:, 0], s=22, marker="s", color=_FAINT, label="one response alone", zorder=1)
    # With two constraints a curve is the sweep of the first one at a fixed second one.
    curves: dict[float, list[Entry]] = {}
    for entry in feasible:
        fixed = round(float(entry.thresholds_M[1]), 9) if len(entry.thresholds_M) > 1 else 0.0
        curves.setdefault(fixed, []).append(entry)
    for i, (fixed, curve) in enumerate(curves.items()):
        exact_2 = np.array([entry.exact.values_N[:2] for entry in curve])
        label = "exact front (convex solver)" if i == 0 else None
        axes.plot(exact_2[:, 1], exact_2[:, 0], color=_INK, linewidth=1.2, alpha=0.8, label=label, zorder=2)
        if len(structure.wins) > 2:
            text = f"{list(structure.wins)[2]} \N{GREATER-THAN OR EQUAL TO} {fixed:.2f}"
            axes.annotate(text, exact_2[0, ::-1], xytext=(-6, 2), textcoords="offset points", fontsize=7, ha="right")
    mopo_2 = np.array([entry.mopo.values_N[:2] for entry in feasible])
    label = "MOPO, exact dual"
    axes.scatter(mopo_2[:, 1], mopo_2[:, 0], s=16, color=_FRONT, label=label, zorder=3)
    for i, entry in enumerate(trained):
        mean_N, error_N = entry.learned_SN.mean(0), entry.error_N
        axes.errorbar(
            mean_N[1], mean_N[0], xerr=error_N[1], yerr=error_N[0], fmt="D", markersize=5, color=_LEARNED,
            ecolor=_LEARNED, elinewidth=1.6, capsize=3, markeredgecolor=_INK, markeredgewidth=0.6, zorder=4,
            label="learned, mean and 95 % interval" if i == 0 else None,
        )  # fmt: skip
        exact_N = entry.exact.values_N
        label = "the exact point it should reach" if i == 0 else None
        axes.scatter(exact_N[1], exact_N[0], s=70, marker="x", linewidths=1.4, color=_OUT, label=label, zorder=5)
    names = list(structure.wins)
    if len(names) > 2:
        axes.set_xlim(left=axes.get_xlim()[0] - 0.1)  # room for the curves' names
    axes.set_xlabel(f"{names[1]} (constrained): win probability", fontsize=9)
    axes.set_ylabel(f"{names[0]} (maximised)", fontsize=9)
    distance = max(entry.distance for entry in feasible)
    axes.set_title(f"{structure.name}: {structure.says}\nMOPO to solver: at most {distance:.0e}", fontsize=10)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
