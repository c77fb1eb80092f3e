"""Where constrained training ends on the task with a price, beside the best fixed weight.

    python -m bench.constrained [--methods lagrangian caid linear-0.5] [--seeds 0 1 2 3 4] [--steps 180] [--keep DIR]

The task is ``configs/task/informative.yaml``: sentiment as high as it goes, ``informative`` at least .5, which the best
policy has exactly, with a sentiment of .75. Each method trains with each seed, one run after the other; a run that is
complete in ``--keep`` is not repeated, and one that was interrupted is resumed. The method ``linear-W`` is a fixed
weight W of ``informative``. The table says of each run

* where its last held-out evaluation ended, and whether that is settled: within .05 of the threshold on its feasible
  side, or with the threshold in its 95 % interval;
* its price: how far its sentiment is below that of the best fixed weight, the one whose mean over seeds meets the
  threshold with the most sentiment;
* in which share of the last half of the evaluations the threshold held, and from where to where the multiplier moved
  over the last quarter.

Beside the runs in DIR: ``constrained.csv`` and ``constrained.png``, the curves. A run takes about three minutes on one
core.
"""

import argparse
import csv
import json
import math
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

from moa_lightning.functional.verdict import Z

ROOT = Path(__file__).resolve().parents[1]
PRIMARY, BOUND, THRESHOLD = "sentiment", "informative", 0.5
NEAR = 0.05  # how far above the threshold the last value may be
FIXED = "linear-"
METHODS = {
    "lagrangian": ["--config=configs/combiner/lagrangian.yaml"],
    "exponential": [
        "--model.combiner=Lagrangian",
        "--model.combiner.dual=Exponential",
        "--model.combiner.dual_window=8",
    ],
    "caid": ["--config=configs/combiner/caid.yaml"],
}
"""Flags by method; what has thresholds gets this task's."""


@dataclass(frozen=True)
class Ended:
    """A run, as its folder says. NaN is not known."""

    method: str
    seed: int
    primary: float
    value: float
    interval: float  # half width, 95 %
    held: float
    dual_low: float
    dual_high: float

    @property
    def settled(self) -> bool:
        """Whether the last value is near the threshold on its feasible side, or has it in its interval."""
        return THRESHOLD <= self.value <= THRESHOLD + NEAR or abs(self.value - THRESHOLD) <= self.interval


def flags(method: str) -> list[str]:
    """What turns the task's run into one of this method.

    Raises:
        ValueError: there is no such method.
    """
    if method.startswith(FIXED):
        weight = float(method.removeprefix(FIXED))
        weights = f"{{{PRIMARY}: {1 - weight:.6g}, {BOUND}: {weight:.6g}}}"
        return ["--model.combiner=Linear", f"--model.combiner.weights={weights}"]
    if method not in METHODS:
        raise ValueError(f"there is no method '{method}'; there are {', '.join(METHODS)} and {FIXED}WEIGHT")
    return [*METHODS[method], f"--model.combiner.thresholds={{{BOUND}: {THRESHOLD}}}"]


def complete(folder: Path, steps: int) -> bool:
    """Whether a run has come to its end: the policy is what it writes last but the summary."""
    if not (folder / "policy" / "config.json").is_file() or not (folder / "summary.json").is_file():
        return False
    return bool(json.loads((folder / "summary.json").read_text(encoding="utf-8"))["steps"] >= steps)


def train(folder: Path, method: str, seed: int, steps: int) -> None:
    """Run it, or the rest of it; its output is in a log beside its folder.

    Raises:
        RuntimeError: it failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    command = [
        *(sys.executable, "-m", "moa_lightning.cli", "fit", "--config=configs/task/informative.yaml"),
        *flags(method),
        *(f"--seed_everything={seed}", f"--trainer.max_steps={steps}", "--trainer.enable_progress_bar=false"),
        *(f"--trainer.default_root_dir={folder}", "--ckpt_path=last"),
    ]
    log = folder.with_suffix(".log")
    with log.open("w", encoding="utf-8") as file:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=file, stderr=file, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed; see {log}")


def read(folder: Path, method: str, seed: int) -> Ended:
    """What a run's folder says."""
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    primary, bound = summary["objectives"][PRIMARY], summary["objectives"][BOUND]
    points = _rows(folder / "front.csv")
    half = points[1:][len(points[1:]) // 2 :]  # the first is the policy before training
    held = [float(p[BOUND]) + Z * float(p[f"{BOUND}_std_error"]) >= THRESHOLD for p in half if BOUND in p]
    duals = [dual for _, dual in _duals(folder)]
    quarter = duals[len(duals) * 3 // 4 :] or [math.nan]
    return Ended(
        method,
        seed,
        primary["end"],
        bound["end"],
        Z * (bound["std_error"] or math.nan),
        sum(held) / len(held) if held else math.nan,
        min(quarter),
        max(quarter),
    )


def _duals(folder: Path) -> list[tuple[int, float]]:
    """The multiplier by step; empty for a fixed weight."""
    name = f"duals/{BOUND}"
    return [(int(row["step"]), float(row[name])) for row in _rows(folder / "metrics.csv") if row.get(name)]


def _rows(file: Path) -> list[dict[str, str]]:
    with file.open(newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def best_fixed(runs: Sequence[Ended]) -> tuple[str, float]:
    """The fixed weight that meets the threshold, in the mean over its seeds, with the most of the primary objective.

    Returns:
        Its name and that mean; NaN where none meets it.
    """
    by_method = defaultdict(list)
    for run in runs:
        if run.method.startswith(FIXED):
            by_method[run.method].append(run)
    means = {
        name: sum(run.primary for run in found) / len(found)
        for name, found in by_method.items()
        if sum(run.value for run in found) / len(found) >= THRESHOLD
    }
    return max(means.items(), key=lambda item: item[1], default=("", math.nan))


def table(runs: Sequence[Ended]) -> list[str]:
    """One line a run, and the mean of each method."""
    name, most = best_fixed(runs)
    lines = [
        f"best fixed weight that meets {THRESHOLD:g}: {name or 'none was run'}"
        + (f", {PRIMARY} {most:.3f}" if name else ""),
        f"{'method':<14}{'seed':>5}{PRIMARY:>11}{BOUND:>20}{'settled':>9}{'price':>8}{'held':>6}{'multiplier':>15}",
    ]
    for run in runs:
        value = f"{run.value:.3f} +- {run.interval:.3f}"
        moved = "-" if math.isnan(run.dual_low) else f"{run.dual_low:.2f} .. {run.dual_high:.2f}"
        lines.append(
            f"{run.method:<14}{run.seed:>5}{run.primary:>11.3f}{value:>20}{'yes' if run.settled else 'no':>9}"
            f"{most - run.primary:>8.3f}{run.held:>6.0%}{moved:>15}"
        )
    for method in dict.fromkeys(run.method for run in runs):
        found = [run for run in runs if run.method == method]
        primary, value = (
            sum(numbers) / len(found) for numbers in zip(*((r.primary, r.value) for r in found), strict=True)
        )
        settled = sum(run.settled for run in found)
        lines.append(
            f"{method}: {PRIMARY} {primary:.3f}, {BOUND} {value:.3f}, settled {settled} of {len(found)}, "
            f"price {most - primary:.3f}"
        )
    return lines


def draw(folders: Sequence[tuple[str, int, Path]], file: Path) -> None:
    """Held-out means and the multiplier, if there is one, over the steps: a row a method, a line a seed."""
    from matplotlib.figure import Figure

    methods = list(dict.fromkeys(method for method, _, _ in folders))
    multiplied = {method for method, _, folder in folders if _duals(folder)}
    figure = Figure(figsize=(11, 2.4 * len(methods)), layout="constrained")
    axes = figure.subplots(len(methods), 3 if multiplied else 2, squeeze=False)
    for method, _, folder in folders:
        row = axes[methods.index(method)]
        points = _rows(folder / "front.csv")
        for panel, name in zip(row, (PRIMARY, BOUND), strict=False):
            if name in points[0]:
                panel.plot([int(p["step"]) for p in points], [float(p[name]) for p in points], marker=".")
        if duals := _duals(folder):
            row[2].plot(*zip(*duals, strict=True), linewidth=0.7)
    for method, row in zip(methods, axes, strict=True):
        row[1].axhline(THRESHOLD, color="black", linewidth=0.7)
        for panel, title in zip(row, (PRIMARY, BOUND, "multiplier"), strict=False):
            panel.set_title(f"{method}: {title}", fontsize=9)
        for panel in row[:2]:
            panel.set_ylim(-0.2, 1.05)
        if method not in multiplied:
            for panel in row[2:]:
                panel.remove()
    figure.savefig(file, dpi=80)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    fixed = [f"{FIXED}{weight}" for weight in (0.4, 0.5, 0.6)]
    parser.add_argument("--methods", nargs="+", default=["lagrangian", "caid", *fixed])
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(5)))
    parser.add_argument("--steps", type=int, default=180)
    parser.add_argument("--keep", type=Path, help="folder of the runs; without it they are lost")
    options = parser.parse_args(arguments)
    for method in options.methods:
        flags(method)  # a wrong name is told before anything is trained
    with tempfile.TemporaryDirectory() as scratch:
        home = (options.keep or Path(scratch)).absolute()
        folders = [(m, s, home / m / f"seed-{s}") for m in options.methods for s in options.seeds]
        for i, (method, seed, folder) in enumerate(folders):
            if not complete(folder, options.steps):
                print(f"[{i + 1}/{len(folders)}] {method}, seed {seed}", flush=True)
                train(folder, method, seed, options.steps)
        runs = [read(folder, method, seed) for method, seed, folder in folders]
        print("\n".join(table(runs)))
        with (home / "constrained.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow([field.name for field in fields(Ended)])
            writer.writerows(astuple(run) for run in runs)
        draw(folders, home / "constrained.png")


if __name__ == "__main__":
    main()
