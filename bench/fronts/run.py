"""Where every combiner ends on toy problems whose fronts are known: one table and one figure, whatever they show.

    python -m bench.fronts [--quick] [--out FOLDER] [--jobs N] [--only NAME …]

Three problems with two objectives, in ``bench.fronts.problems``:

* **concave front**: a bandit with actions worth (1, 0), (.85, .6), (.6, .85), (0, 1), (.3, .3) and (0, 0). A softmax
  policy reaches their convex hull; the front is the line through the first four.
* **specialists**: (1, 0), (0, 1) and (0, 0). The front is the line between the first two, and every point of it but the
  ends takes a mixture of actions of which none is good for both. PAMA with Noon per token is known to stall here.
* **non-convex**: the mean of a narrow normal distribution between two hills, Fonseca and Fleming's problem. It cannot
  mix the hills, so its front bends towards the origin in the middle, where no weighted sum has a maximum.

A policy of three, six or two parameters is trained with the package's own combiner, loss and advantages on samples of
itself: 256 at each step, in 16 groups that count as the responses to a prompt, one update of Adam on each batch, 600
steps, five seeds. Rewards lie in [0, 1]; ``GroupRelative`` turns them into advantages, without standardising. The Gram
matrix of gradient combiners is that of the true gradients by the parameters. Combiners are those that the package
exports, as they are without arguments, and some variants, with these exceptions:

* what takes thresholds gets one for the second objective, and a dual step large enough for 600 steps (``SETTINGS``);
* MOPO trains by weighted likelihood on responses of the policy itself; the probability of a win is the reward, as if
  every response met the same rival, so that its thresholds are in the same units as those of the others;
* MODPO trains by pairwise logistic loss on comparisons sampled by Bradley and Terry's model;
* MODPO and CAID, which cannot do without it, are held to the first policy by a little KL, the others by none; so is the
  optimum that CAID solves for, on four batches of that first policy, a little off the one that it is compared with.
  On the non-convex problem its closed form is no single normal distribution, so that its multipliers belong to policies
  that cannot be trained here.

How to read the table. ``distance`` is the Euclidean distance of the final policy's exact values from the nearest point
of the front, mean and standard error over the seeds. ``first`` and ``second`` are the values reached, mean and
standard deviation over the seeds: a large one says that seeds end at different points. ``from optimum`` is the distance
from the exact constrained optimum. A point of the front is Pareto-optimal; that it is near the middle is not asked for,
and equal weights do not promise it.

In the folder: ``fronts.csv`` (the table), ``runs.csv`` (each seed), ``fronts.png``. In the figure, colours are families
and the rows below are the legend; a distance below 1e-4 stands at the edge. About six minutes on two idle cores.
"""

import argparse
import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bench.combiners.roster import Entry, exported, variants
from bench.fronts.learned import Recipe, Run, learn
from bench.fronts.problems import PROBLEMS, Problem
from bench.fronts.report import Ends, draw, print_table, runs_of, write_csv
from moa_lightning.combiners import PID, Exponential, Lagrangian, Optimistic, Projected

SETTINGS: dict[str, dict[str, Any]] = {
    # A batch of 256 is precise enough by itself, and a window's delay makes multipliers swing.
    "Lagrangian": {"dual": Exponential(lr=1.0), "window": 1},
    "Lagrangian, optimistic": {"dual": Optimistic(lr=0.2), "window": 1},
    "MOPO": {"dual": Projected(lr=0.2)},
    "CAID, iterated": {"dual": Projected(lr=0.2), "window": 1},
}


def roster() -> list[Entry]:
    """What is run, with the settings of this benchmark."""
    controlled = Entry("Lagrangian, PID", Lagrangian(dual=PID(kp=3.0, ki=0.1), window=1))
    return [
        replace(entry, combiner=replace(entry.combiner, **SETTINGS.get(entry.name, {})))
        for entry in [*exported(), *variants(), controlled]
    ]


def family(entry: Entry) -> str:
    """What the figure's colour says."""
    return "thresholds" if "thresholds" in entry.combiner.__dataclass_fields__ else entry.kind.split(",")[0]


@dataclass(frozen=True)
class Task:
    """One policy to train; it travels to a process of its own."""

    problem: Problem
    name: str
    recipe: Recipe
    seed: int


def train(task: Task) -> Run:
    """Train one policy on one thread."""
    torch.set_num_threads(1)
    (entry,) = (entry for entry in roster() if entry.name == task.name)
    return learn(task.problem, entry, task.recipe, task.seed)


def train_all(tasks: Sequence[Task], jobs: int) -> list[Run]:
    """Train them all, so many at a time."""
    if jobs == 1:
        return [train(task) for task in tasks]
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(train, tasks, chunksize=5))


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, print and write."""
    parser = argparse.ArgumentParser(prog="python -m bench.fronts", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two seeds and a few steps: shows that it runs")
    parser.add_argument("--out", type=Path, default=Path("runs/fronts"), help="folder for table and figure")
    parser.add_argument("--jobs", type=int, default=2, help="policies to train at the same time")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="combiners whose name begins so")
    options = parser.parse_args(arguments)
    started = time.perf_counter()
    recipe, seeds = (Recipe(steps=4, samples=32, group=4), 2) if options.quick else (Recipe(), 5)
    entries = [e for e in roster() if options.only is None or e.name.startswith(tuple(options.only))]
    print(f"{recipe.samples} samples at each of {recipe.steps} steps, {seeds} seeds.", flush=True)
    rows: list[Ends] = []
    for problem in PROBLEMS:
        tasks = [Task(problem, entry.name, recipe, seed) for entry in entries for seed in range(seeds)]
        runs = train_all(tasks, options.jobs)
        parts = [tuple(runs[i : i + seeds]) for i in range(0, len(runs), seeds)]
        rows += [Ends(e.name, family(e), problem, part) for e, part in zip(entries, parts, strict=True)]
        print_table(rows[-len(entries) :])
    options.out.mkdir(parents=True, exist_ok=True)
    write_csv([row.numbers() for row in rows], options.out / "fronts.csv")
    write_csv([run for row in rows for run in runs_of(row)], options.out / "runs.csv")
    draw(rows, options.out / "fronts.png")
    print(f"\nWritten to {options.out}, after {time.perf_counter() - started:.0f} s.")
