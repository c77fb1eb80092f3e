"""The picture of a Pareto front."""

from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moa_lightning.utils.atomic_file import atomic_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_INK, _FAINT, _FRONT, _END = "#222222", "#b8b8b8", "#d1495b", "#00798c"


def draw_front(
    points: list[dict[str, Any]],
    on_front: list[bool],
    reference: dict[str, float],
    volume: float,
    file: Path,
    transforms: Mapping[str, str],
) -> None:
    """Draw a run's evaluation points, one panel for each pair of objectives; the file appears whole.

    Args:
        points: ``{"step", "mean": {name: value}, "std_error": {name: value}}`` in the order of the run.
        on_front: which of them no other one dominates.
        reference: the point from which the hypervolume counts.
        volume: the hypervolume, for the title.
        file: the PNG to write.
        transforms: how values follow from raw scores, in words, of the objectives where they differ.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(points[0]["mean"])
    pairs = list(combinations(names, 2)) or [(names[0], names[0])]
    columns = min(len(pairs), 3)
    rows = (len(pairs) + columns - 1) // columns
    # No pyplot: it would keep global state and choose a backend for the whole process.
    figure = Figure(figsize=(6.4 * columns, 4.8 * rows), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"Pareto front after {points[-1]['step']} steps   hypervolume {volume:.4g}", color=_INK)
    for index, (a, b) in enumerate(pairs):
        axes = figure.add_subplot(rows, columns, index + 1)
        _panel(axes, figure, points, on_front, reference, a, b)
        axes.set_xlabel(_label(a, transforms))
        axes.set_ylabel(_label(b, transforms))
    with atomic_file(file) as scratch:
        figure.savefig(scratch, format="png")


def _label(name: str, transforms: Mapping[str, str]) -> str:
    return f"{name} (value, {transforms[name]})" if name in transforms else f"{name} (mean reward)"


def _panel(
    axes: Any,
    figure: "Figure",
    points: list[dict[str, Any]],
    on_front: list[bool],
    reference: dict[str, float],
    a: str,
    b: str,
) -> None:
    xs, ys = [p["mean"][a] for p in points], [p["mean"][b] for p in points]
    axes.errorbar(
        xs,
        ys,
        xerr=[p["std_error"][a] for p in points],
        yerr=[p["std_error"][b] for p in points],
        fmt="none",
        ecolor=_FAINT,
        elinewidth=1,
        zorder=1,
    )
    axes.plot(xs, ys, color=_FAINT, linewidth=1, zorder=2)
    drawn = axes.scatter(xs, ys, c=[p["step"] for p in points], cmap="viridis", s=36, zorder=3)
    best = sorted((x, y) for x, y, keep in zip(xs, ys, on_front, strict=True) if keep)
    axes.scatter(*zip(*best, strict=True), s=130, facecolors="none", edgecolors=_FRONT, linewidths=1.8, zorder=4)
    low_x, low_y = reference[a], reference[b]
    if len(points[0]["mean"]) == 2:  # with more objectives the dominated region is no staircase in two of them
        stairs = [(low_x, best[0][1])]
        for i, (x, y) in enumerate(best):
            stairs += [(x, y), (x, best[i + 1][1] if i + 1 < len(best) else low_y)]
        stairs = [(max(x, low_x), max(y, low_y)) for x, y in stairs]
        axes.fill(
            [low_x, *(x for x, _ in stairs)], [low_y, *(y for _, y in stairs)], color=_FRONT, alpha=0.07, zorder=0
        )
    axes.scatter([low_x], [low_y], marker="x", color=_INK, s=40, zorder=3)
    for x, y, text in ((low_x, low_y, "reference"), (xs[0], ys[0], "start"), (xs[-1], ys[-1], "end")):
        axes.annotate(text, (x, y), xytext=(7, 7), textcoords="offset points", color=_INK, fontsize=9)
    axes.margins(0.12)
    axes.spines[["top", "right"]].set_visible(False)
    figure.colorbar(drawn, ax=axes, label="step")
