"""MOPO on problems whose optimum is known: the exact front, MOPO's points on it, learned policies, and ablations.

    python -m bench.mopo [--quick] [--out FOLDER] [--jobs N]
    python -m bench.mopo --cost [--quick] [--out FOLDER]
    python -m bench.mopo --votes [--quick] [--out FOLDER] [--jobs N]

A problem is six to eight responses to one prompt, a win matrix for each of two or three objectives, and a reference: a
freshly initialised language model, restricted to these responses. The first objective is maximised, less tau times the
KL divergence from the reference, while the mean win probability under each other one stays at or above a threshold.
Seven structures: agreement, total conflict, partial conflict, three objectives, a Condorcet cycle, near-deterministic
preferences, ties. The whole run takes under ten minutes on two cores, and needs the extra ``test`` (for CVXPY).

How to read the tables.

* **Exact.** A line is a structure, swept over thresholds from below what the optimum without constraints gives up to
  95 % of the way to the most that any response has. ``agree`` counts the thresholds where CVXPY's Clarabel and
  ``one_shot_dual`` say the same about whether they can be met. Over those that can, the largest difference between the
  two: ``distance``, Euclidean, between the values of the objectives; ``TV``, total variation between the policies;
  ``objective``, of the maximum itself. The distance must stay within 1e-3.
* **Learned.** A line is an objective at one threshold. A one-layer GPT-2 is trained by MOPO's recipe on comparisons
  drawn from the matrices, once for each seed; the seed decides the comparisons, the reference is the same. ``learned``
  is the mean over the seeds of the policy's value under the true preferences, ``+-`` half its 95 % interval, ``inside``
  whether the exact value lies in it. ``TV`` is the mean total variation from the exact policy on the listed responses,
  renormalised; ``outside`` the largest probability of all other texts together, which the exact problem does not have.
* **Ablations.** A line is one run with adaptive thresholds (beta times the reference's value at each refresh), the
  lagged reference and a tabular policy on exact preferences: ``primary`` and ``secondary`` are the values of the last
  policy, ``KL`` its divergence from the first, ``multiplier`` the last, ``largest`` the largest one on the way,
  ``threshold`` the last. ``t0`` is the number of steps between two refreshes, ``inf`` none at all.
* **Cost** (``--cost``). The dual step and the weights, in milliseconds and as a share of a training step, all in CPU
  time of one thread. The step is a forward and a backward pass alone, so the share is an upper bound for one thread; on
  several cores the step gets faster and the dual step, which is a few dozen operations on tiny tensors, does not.

* **Votes** (``--votes``). Labels are one 0/1 vote for each pair of a prompt's K responses, on prompts whose true win
  probabilities are known; the policy is a table. ``second`` is the objective with the threshold: a ``coin``, a
  ``Condorcet`` circle (in both no policy is worth more than .5) or ``Bradley-Terry`` preferences. ``believed`` is the
  value of the optimum by the labels that made it, ``values`` what moved the multiplier (``dual values``), ``choice``
  the truth of it: the policy's choice among K responses; ``policy`` that of a response which it samples. ``believed
  met`` and ``met`` count the thresholds that the believed value and the held-out interval (95 %) call met, ``false``
  how many of these the last policy's choice truly misses. There is an evaluation every ten steps.
* **Missing labels** (``--votes`` too). Labels are probabilities, and 30 % of the second objective's are missing at
  random. ``choice - values`` is by how much the truth exceeds what moved the multiplier, ``largest`` in the worst
  problem. ``policy - values`` has in it also that a choice among K responses is not a sample from all.

In the folder: ``exact.csv``, ``learned.csv``, ``ablations.csv``, ``front.png``, ``cost.csv``, ``votes.csv``,
``missing.csv``.

In the figure a panel is a structure, the constrained objective to the right, the maximised one upwards. Single
responses can lie above the front, because the divergence from the reference is charged for. With three objectives a
curve is a sweep of the first threshold at a fixed second one, seen along the third axis. The strip below a panel shows
how far the learned values lie from the exact ones, in thousandths of a win probability.

Legend: M secondary objectives, N objectives, K responses.
"""

import argparse
import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from transformers.utils import logging as transformers_logging

from bench.mopo.ablation import BETAS, INTERVALS, TAUS, Setting, ablate
from bench.mopo.cost import as_dict, cost
from bench.mopo.learned import Learned, Recipe, learn, prior, write_policy
from bench.mopo.report import Entry, draw, print_exact, print_learned, write_csv
from bench.mopo.structures import STRUCTURES, Structure, mopo, partial_conflict, solve, sweep, total_conflict
from bench.mopo.votes import MISSING, PRECISE, VOTES, Settings, as_rows, print_missing, print_votes
from bench.mopo.votes import study as study_labels


@dataclass(frozen=True)
class Plan:
    """How much to compute."""

    thresholds: int  # of a sweep; a smaller grid where there are two constraints
    shares: tuple[float, ...]  # where policies are trained, as in ``chosen_thresholds``
    seeds: int
    recipe: Recipe
    ablation: Setting


DEFAULT = Plan(23, (0.2, 0.45, 0.7), 4, Recipe(comparisons=1_000, steps=300), Setting(steps=3000))
QUICK = Plan(8, (0.4,), 2, Recipe(comparisons=1_000, steps=80), Setting(steps=150))


@dataclass(frozen=True)
class Task:
    """One policy to train; it travels to a process of its own."""

    folder: Path
    structure: Structure
    thresholds_M: np.ndarray
    recipe: Recipe
    seed: int


def train(task: Task) -> Learned:
    """Train one policy on one thread."""
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    with TemporaryDirectory() as workplace:
        return learn(task.folder, [task.structure], task.thresholds_M, task.recipe, task.seed, Path(workplace))[0]


def train_all(tasks: Sequence[Task], jobs: int) -> list[Learned]:
    """Train them all, so many at a time."""
    if jobs == 1:
        return [train(task) for task in tasks]
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(train, tasks))


def sweep_front(structure: Structure, prior_K: np.ndarray, plan: Plan) -> list[Entry]:
    """Both exact answers at every threshold."""
    tau = plan.recipe.tau
    count = plan.thresholds if len(structure.wins) == 2 else max(plan.thresholds // 3, 3)
    thresholds = sweep(structure, tau, prior_K, count)
    return [
        Entry(structure, b, solve(structure, b, tau, prior_K), mopo(structure, b, tau, prior_K)) for b in thresholds
    ]


def chosen_thresholds(structure: Structure, prior_K: np.ndarray, share: float, tau: float) -> np.ndarray:
    """That share of the way from what the optimum without constraints gives to the most; less with two constraints."""
    constraints = len(structure.wins) - 1
    free_M = solve(structure, np.zeros(constraints), tau, prior_K).values_N[1:]
    return free_M + share / constraints * (structure.wins_KN.numpy()[:, 1:].max(0) - free_M)


def study(plan: Plan, out: Path, jobs: int) -> None:
    """Exact front and learned policies: tables, CSV files and the figure."""
    with TemporaryDirectory() as scratch:
        folder, tau = write_policy(Path(scratch)), plan.recipe.tau
        structures = [build() for build in STRUCTURES]
        priors = [prior(folder, structure) for structure in structures]
        sweeps = {s.name: sweep_front(s, prior_K, plan) for s, prior_K in zip(structures, priors, strict=True)}
        exact = [entry for entries in sweeps.values() for entry in entries]
        print_exact(exact)
        write_csv([entry.numbers() for entry in exact], out / "exact.csv")

        entries: list[Entry] = []
        for structure, prior_K in zip(structures, priors, strict=True):
            for share in plan.shares:
                b = chosen_thresholds(structure, prior_K, share, tau)
                entries.append(Entry(structure, b, solve(structure, b, tau, prior_K), mopo(structure, b, tau, prior_K)))
        tasks = [
            Task(folder, entry.structure, entry.thresholds_M, plan.recipe, seed)
            for entry in entries
            for seed in range(plan.seeds)
        ]
        learned = train_all(tasks, jobs)
    trained = [
        replace(entry, learned=learned[i * plan.seeds : (i + 1) * plan.seeds]) for i, entry in enumerate(entries)
    ]
    print_learned(trained)
    write_csv([entry.numbers() for entry in trained], out / "learned.csv")
    of_structure = {name: [entry for entry in trained if entry.structure.name == name] for name in sweeps}
    draw(sweeps, of_structure, out / "front.png")


def ablations(plan: Plan, out: Path) -> None:
    """One table for beta, t0 and tau, from an equal first policy."""
    base, rows = plan.ablation, []
    settings = [
        *(("beta", beta, replace(base, beta=beta)) for beta in BETAS),
        *(("t0", interval or "inf", replace(base, interval=interval)) for interval in INTERVALS),
        *(("tau", tau, replace(base, tau=tau)) for tau in TAUS),
    ]
    print(
        f"\nAblations: adaptive thresholds, {base.steps} steps; where not varied, beta {base.beta}, "
        f"t0 {base.interval}, tau {base.tau}.\n"
    )
    print(
        f"{'structure':18}{'varied':>8}{'':>7}{'primary':>9}{'secondary':>11}{'KL':>7}{'multiplier':>12}{'largest':>9}{'threshold':>11}"
    )
    for structure in (total_conflict(), partial_conflict()):
        prior_K = np.full(len(structure.responses), 1 / len(structure.responses))
        start = prior_K @ structure.wins_KN.numpy()
        print(f"{structure.name:18}{'start':>8}{'':>7}{start[0]:>9.3f}{start[1]:>11.3f}")
        for name, value, setting in settings:
            found = ablate(structure, prior_K, setting)
            numbers = {
                "primary": float(found.values_N[0]),
                "secondary": float(found.values_N[1]),
                "kl": found.kl,
                "multiplier": float(found.duals_M[0]),
                "largest_multiplier": float(found.largest_duals_M[0]),
                "threshold": float(found.thresholds_M[0]),
            }
            rows.append({"structure": structure.name, "varied": name, "value": value, **numbers})
            p, q, kl, multiplier, largest, threshold = numbers.values()
            print(
                f"{'':18}{name:>8}{value!s:>7}{p:>9.3f}{q:>11.3f}{kl:>7.3f}{multiplier:>12.3f}{largest:>9.3f}{threshold:>11.3f}"
            )
    write_csv(rows, out / "ablations.csv")


def noisy(vote_seeds: int, missing_seeds: int, out: Path, jobs: int) -> None:
    """Two tables: labels that are votes, and labels that are missing."""
    votes = study_labels(VOTES, vote_seeds, jobs, Settings())
    print_votes(votes)
    write_csv(as_rows(votes), out / "votes.csv")
    missing = study_labels(MISSING, missing_seeds, jobs, PRECISE)
    print_missing(missing)
    write_csv(as_rows(missing), out / "missing.csv")


def main(arguments: Sequence[str] | None = None) -> None:
    """Compute, print and write."""
    parser = argparse.ArgumentParser(prog="python -m bench.mopo", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--quick", action="store_true", help="fewer thresholds and seeds, short runs, for less than a minute"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/mopo"), help="folder for tables and figure")
    parser.add_argument("--jobs", type=int, default=2, help="policies to train at the same time")
    parser.add_argument("--cost", action="store_true", help="measure the cost of the dual step instead")
    parser.add_argument("--votes", action="store_true", help="noisy and missing labels instead")
    options = parser.parse_args(arguments)
    started = time.perf_counter()
    options.out.mkdir(parents=True, exist_ok=True)
    transformers_logging.disable_progress_bar()
    if options.cost:
        write_csv([as_dict(row) for row in cost(options.quick)], options.out / "cost.csv")
    elif options.votes:
        noisy(1 if options.quick else 20, 1 if options.quick else 5, options.out, options.jobs)
    else:
        plan = QUICK if options.quick else DEFAULT
        study(plan, options.out, options.jobs)
        ablations(plan, options.out)
    print(f"\nWritten to {options.out}, after {time.perf_counter() - started:.0f} s.")
