"""``moa compare``: what several runs reached, side by side."""

import csv
import json
import math
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Any

_Z = 1.96  # a normal 95 % interval: evaluations are means over many prompts


@dataclass(frozen=True)
class Reached:
    """The end of one run."""

    run: str
    combiner: str
    steps: int
    mean: dict[str, float]
    interval: dict[str, float]  # half width of the 95 % interval
    thresholds: dict[str, float]

    def outcome(self, name: str) -> str:
        """Whether a threshold is met: ``met``, ``missed``, or ``open`` where the interval holds it."""
        if name not in self.thresholds:
            return ""
        distance = self.mean[name] - self.thresholds[name]
        if abs(distance) <= self.interval[name]:
            return "open"
        return "met" if distance > 0 else "missed"


def compare(runs: str | list[str], output: str | None = None) -> None:
    """Print what runs reached on their validation prompts: each objective with its 95 % interval, and its threshold.

    A run that no other one dominates is marked. A threshold is ``met`` or ``missed`` where the interval lies on one
    side of it, and ``open`` where it holds it.

    Args:
        runs: folders of runs, or ``summary.json`` files, or patterns such as ``runs/mopo-*``; they must share their
            objectives.
        output: folder for ``comparison.csv`` and ``comparison.png``; none is written without it.

    Raises:
        ValueError: a folder holds no summary, or the runs have other objectives.
    """
    patterns = [runs] if isinstance(runs, str) else runs
    found = [_read(run) for pattern in patterns for run in _matching(pattern)]
    if len(found) < 2:
        raise ValueError(f"--runs needs two or more runs, got {len(found)}; such as --runs='runs/mopo-*'")
    names = list(found[0].mean)
    for other in found[1:]:
        if sorted(other.mean) != sorted(names):
            raise ValueError(
                f"'{other.run}' has the objectives {', '.join(other.mean)}, '{found[0].run}' has {', '.join(names)}; "
                "compare runs on the same ones"
            )
    on_front = _on_front(found, names)
    for line in _table(found, names, on_front):
        print(line)
    if output is not None:
        _write(found, names, on_front, Path(output))
        print(f"written to {output}: comparison.csv, comparison.png")


def _matching(pattern: str) -> list[str]:
    """The runs that a pattern means; other folders that it matches are passed over, one that is named is not."""
    matches = sorted(glob(pattern))
    if matches == [pattern]:
        return matches
    return [m for m in matches if not Path(m).is_dir() or (Path(m) / "summary.json").is_file()] or [pattern]


def _read(run: str) -> Reached:
    path = Path(run) / "summary.json" if Path(run).is_dir() else Path(run)
    try:
        summary: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        objectives = summary["objectives"]
        return Reached(
            run,
            summary["combiner"],
            summary["steps"],
            {name: o["end"] for name, o in objectives.items()},
            {name: _Z * (0.0 if o["std_error"] is None else o["std_error"]) for name, o in objectives.items()},
            {name: t for name, t in summary.get("thresholds", {}).items() if name in objectives},
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"'{run}' holds no summary.json of a run; give folders that moa fit wrote") from error


def _on_front(found: list[Reached], names: list[str]) -> list[bool]:
    import torch

    from moa_lightning.functional import non_dominated

    points_PN = torch.tensor([[run.mean[name] for name in names] for run in found], dtype=torch.float64)
    return [bool(keep) for keep in non_dominated(points_PN)]


def _table(found: list[Reached], names: list[str], on_front: list[bool]) -> list[str]:
    head = ["run", "combiner", "steps", *(f"{name} (95 %)" for name in names), "front", "thresholds"]
    lines = [head]
    for run, keep in zip(found, on_front, strict=True):
        values = [f"{run.mean[n]:.3f} ± {run.interval[n]:.3f}" for n in names]
        told = "; ".join(f"{n} {t:.3g}: {run.outcome(n)}" for n, t in run.thresholds.items())
        lines.append([run.run, run.combiner, str(run.steps), *values, "*" if keep else "", told])
    if not any(run.thresholds for run in found):
        lines = [line[:-1] for line in lines]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]


def _cell(text: str) -> str:
    """A text that no spreadsheet takes for a formula."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def _write(found: list[Reached], names: list[str], on_front: list[bool], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "comparison.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        each = [f"{n}{what}" for n in map(_cell, names) for what in ("", "_interval", "_threshold", "_outcome")]
        writer.writerow(["run", "combiner", "steps", "non_dominated", *each])
        for run, keep in zip(found, on_front, strict=True):
            cells = [
                cell
                for n in names
                for cell in (run.mean[n], run.interval[n], run.thresholds.get(n, math.nan), run.outcome(n))
            ]
            writer.writerow([_cell(run.run), _cell(run.combiner), run.steps, int(keep), *cells])

    from moa_lightning.commands.compare_plot import draw_comparison

    draw_comparison(found, names, on_front, folder / "comparison.png")
