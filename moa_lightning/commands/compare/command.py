"""``moa compare``: what several runs reached, side by side."""

import csv
import math
from glob import glob
from pathlib import Path

from rich import box
from rich.table import Table

from moa_lightning.commands.compare.reached import Reached, read
from moa_lightning.errors import UserError
from moa_lightning.utils.console import table_console


def compare(runs: str | list[str], output: str | None = None) -> None:
    """Print what runs reached on their validation prompts: each objective with its 95 % interval, and its threshold.

    Numbers are means of values, after scale, shift and clip; the raw mean stands beside them where it differs.
    A run that no other one dominates is marked. A threshold is ``met`` or ``missed`` where the interval lies on one
    side of it, and ``open`` where it holds it.

    Args:
        runs: folders of runs, or ``summary.json`` files, or patterns such as ``runs/mopo-*``, as a list or each with a
            ``--runs`` of its own; they must share their objectives.
        output: folder for ``comparison.csv`` and ``comparison.png``; none is written without it.

    Raises:
        UserError: a folder holds no summary, or the runs have other objectives.
    """
    patterns = [runs] if isinstance(runs, str) else runs
    found = [read(run) for pattern in patterns for run in _matching(pattern)]
    if len(found) < 2:
        raise UserError(f"--runs needs two or more runs, got {len(found)}; such as --runs='runs/mopo-*'")
    names = list(found[0].mean)
    for other in found[1:]:
        if sorted(other.mean) != sorted(names):
            raise UserError(
                f"'{other.run}' has the objectives {', '.join(other.mean)}, '{found[0].run}' has {', '.join(names)}; "
                "compare runs on the same ones"
            )
    on_front, notes = _on_front(found, names)
    table_console().print(_table(found, names, on_front))
    for line in [f"{run.run}: {lack}" for run in found for lack in run.lacks] + notes:
        print(line)
    if output is not None:
        _write(found, names, on_front, Path(output))
        print(f"written to {output}: comparison.csv, comparison.png")


def _matching(pattern: str) -> list[str]:
    """The runs that a pattern means; whatever else it matches is passed over, unless it was named without a pattern."""
    matches = sorted(glob(pattern))
    if matches == [pattern]:
        return matches
    return [m for m in matches if Path(m).suffix == ".json" or (Path(m) / "summary.json").is_file()] or [pattern]


def _on_front(found: list[Reached], names: list[str]) -> tuple[list[bool], list[str]]:
    """Which runs no other one dominates, and lines on those that cannot be compared."""
    import torch

    from moa_lightning.functional import non_dominated

    notes = []
    for name in names:
        units = sorted({unit or "raw" for run in found if (unit := run.transform[name]) is not None})
        if len(units) > 1:
            notes.append(f"'{name}' is {' in some runs, '.join(units)} in others: in different units, no front")
    if notes:
        return [False] * len(found), notes
    points_PN = torch.tensor([[run.mean[name] for name in names] for run in found], dtype=torch.float64)
    known_P = points_PN.isfinite().all(1)
    on_front_P = torch.zeros(len(found), dtype=torch.bool)
    on_front_P[known_P] = torch.as_tensor(non_dominated(points_PN[known_P]))
    return [bool(keep) for keep in on_front_P], notes


def _table(found: list[Reached], names: list[str], on_front: list[bool]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    with_thresholds = any(run.thresholds for run in found)
    for heading in ("run", "combiner"):
        table.add_column(heading, overflow="fold")
    for heading in ("steps", *(f"{name} (95 %)" for name in names)):
        table.add_column(heading, justify="right", overflow="fold")
    for heading in ("front", *(["thresholds"] if with_thresholds else [])):
        table.add_column(heading, overflow="fold")
    for run, keep in zip(found, on_front, strict=True):
        cells = [run.cell(name) for name in names]
        told = "; ".join(f"{n} {t:.3g}: {run.verdict[n]}" for n, t in run.thresholds.items())
        last = ["*" if keep else "", *([told] if with_thresholds else [])]
        table.add_row(run.run, run.combiner, str(run.steps), *cells, *last)
    return table


def _cell(text: str) -> str:
    """A text that no spreadsheet takes for a formula."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def _write(found: list[Reached], names: list[str], on_front: list[bool], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "comparison.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        each = [f"{n}{what}" for n in map(_cell, names) for what in ("", "_interval", "_threshold", "_outcome")]
        with_raw = [n for n in names if any(n in run.raw for run in found)]
        raw = [f"{n}{what}" for n in map(_cell, with_raw) for what in ("_raw", "_value")]
        writer.writerow(["run", "combiner", "steps", "non_dominated", *each, *raw])
        for run, keep in zip(found, on_front, strict=True):
            cells = [
                cell
                for n in names
                for cell in (run.mean[n], run.interval[n], run.thresholds.get(n, math.nan), run.verdict.get(n, ""))
            ]
            cells += [
                cell for n in with_raw for cell in (run.raw.get(n, run.mean[n]), _cell(run.transform[n] or "raw"))
            ]
            writer.writerow([_cell(run.run), _cell(run.combiner), run.steps, int(keep), *cells])

    from moa_lightning.commands.compare.picture import draw_comparison

    draw_comparison(found, names, on_front, folder / "comparison.png")
