"""MOPO on labels that are noisy or missing, with true win probabilities known.

A policy of probabilities in a table is trained by the combiner on rows as ``PreferenceRows`` gives them: prompts with K
of their responses, sampled without replacement, labelled by one vote for each pair or by its probability. The policy
step is exact: the weighted likelihood's maximiser over an exponential window of the batches. The held-out rows are the
same at each evaluation, as in a run.

Legend: X prompts, R responses to each, B rows of a batch with K responses each, N objectives: ``first`` is maximised,
``second`` has the threshold.
"""

import multiprocessing
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from moa_lightning.combiners import MOPO, Projected
from moa_lightning.functional.preference import group_softmax, group_sum
from moa_lightning.types import Experience, Responses, RewardTable

Missing = Literal["nothing", "one response", "objective", "comparisons", "prompt"]
NAMES = ("first", "second")
Z = 1.96  # of a 95 % interval


@dataclass(frozen=True)
class Problem:
    """What is to be learnt, and how it is shown."""

    second: Literal["coin", "Condorcet", "Bradley-Terry"]
    responses: int  # K
    threshold: float
    seed: int
    votes: bool = True
    missing: Missing = "nothing"  # of the second objective's labels; ``prompt``: of both
    share: float = 0.3  # of what is missing
    dual_values: Literal["policy", "held_out", "optimum"] = "policy"


@dataclass(frozen=True)
class Settings:
    """How long and how the policy is trained."""

    prompts: int = 3
    pool: int = 10  # R
    batch: int = 256
    steps: int = 200
    averaged: int = 25  # last steps, in the values that are reported
    window: float = 0.9
    tau: float = 0.08
    dual_rate: float = 0.5
    held_out: int = 400  # rows
    interval: int = 10  # steps between two evaluations


@dataclass(frozen=True)
class Outcome:
    """What a run believed, and what is true of its policy: win probabilities of the second objective."""

    believed: float  # of the optimum, by the labels that made it
    values: float  # that moved the multiplier
    choice: float  # true, of the policy's choice among a prompt's K responses: what the values estimate
    policy: float  # true, of a response that the policy samples from all of them
    last_choice: float  # the same two of the last policy; the others are means over the last steps
    last_policy: float
    held_out: float  # of the last policy, by the labels of rows that it has not seen
    error: float  # standard error of it
    dual: float
    first: float  # true, of the objective that is maximised

    def believed_met(self, threshold: float) -> bool:
        """Whether the optimum that the labels made is at the threshold, as the dual leaves it, or above."""
        return self.believed >= threshold - 0.005

    def met(self, threshold: float) -> bool:
        """Whether the held-out interval lies above the threshold."""
        return self.held_out - Z * self.error > threshold


def win_matrices(kind: str, prompts: int, pool: int, generator: torch.Generator) -> Tensor:
    """Win probabilities ``(X, R, R)``, float64."""
    if kind == "coin":
        return torch.full((prompts, pool, pool), 0.5, dtype=torch.float64)
    if kind == "Condorcet":  # each wins against the half of the others that follows it in a circle
        ahead_RR = (torch.arange(pool) - torch.arange(pool).unsqueeze(1)) % pool
        wins_RR = torch.full((pool, pool), 0.5, dtype=torch.float64)
        wins_RR[(ahead_RR > 0) & (ahead_RR < pool / 2)] = 0.9
        wins_RR[ahead_RR > pool / 2] = 0.1
        return wins_RR.expand(prompts, pool, pool)
    scores_XR = torch.randn(prompts, pool, generator=generator, dtype=torch.float64)
    return (scores_XR.unsqueeze(2) - scores_XR.unsqueeze(1)).sigmoid()


@dataclass(frozen=True)
class World:
    """True preferences, and rows drawn from them."""

    wins_NXRR: Tensor
    generator: torch.Generator

    @property
    def true_XRN(self) -> Tensor:
        """Each response's mean win probability against the others."""
        off_RR = ~torch.eye(self.wins_NXRR.shape[-1], dtype=torch.bool)
        return (self.wins_NXRR * off_RR).sum(3).movedim(0, 2) / (self.wins_NXRR.shape[-1] - 1)

    def rows(self, count: int, problem: Problem) -> "Rows":
        """So many rows, labelled as the problem says."""
        size, draw = problem.responses, self.generator
        prompt_B = torch.randint(self.wins_NXRR.shape[1], (count,), generator=draw)
        response_BK = torch.rand(count, self.wins_NXRR.shape[2], generator=draw).argsort(1)[:, :size]
        wins_NBKK = self.wins_NXRR[:, prompt_B.view(-1, 1, 1), response_BK.unsqueeze(2), response_BK.unsqueeze(1)]
        if problem.votes:
            won = (torch.rand(wins_NBKK.shape, generator=draw, dtype=torch.float64) < wins_NBKK).double().triu(1)
            wins_NBKK = won + (1 - won.mT).tril(-1)
        known_NBKK = (~torch.eye(size, dtype=torch.bool)).repeat(len(NAMES), count, 1, 1)
        if problem.missing == "comparisons":
            kept_BKK = (torch.rand(count, size, size, generator=draw) >= problem.share).triu(1)
            known_NBKK[1] &= kept_BKK | kept_BKK.mT
        labels_NBK = wins_NBKK.where(known_NBKK, 0.0).sum(3) / known_NBKK.sum(3)
        hit_B = torch.rand(count, generator=draw) < problem.share
        if problem.missing == "one response":
            labels_NBK[1, hit_B, torch.randint(size, (int(hit_B.sum()),), generator=draw)] = torch.nan
        if problem.missing in ("objective", "prompt"):
            labels_NBK[1 if problem.missing == "objective" else slice(None), hit_B] = torch.nan
        labels_BN = labels_NBK.movedim(0, 2).flatten(0, 1).float()
        return Rows(prompt_B.repeat_interleave(size), response_BK.flatten(), labels_BN)


@dataclass(frozen=True)
class Rows:
    """Responses of a batch, those to a prompt together."""

    prompt_B: Tensor
    response_B: Tensor
    wins_BN: Tensor

    def experience(self, log_ratio_XR: Tensor, size: int) -> Experience:
        """What ``PreferenceRows`` collects of them, with K responses to a prompt."""
        wins_BN, texts = self.wins_BN, [""] * len(self.wins_BN)
        mask_BT = wins_BN.isfinite().any(1, keepdim=True)
        tokens_BL, nothing_BT = torch.ones(len(wins_BN), 2), torch.zeros(len(wins_BN), 1)
        return Experience(
            responses=Responses(tokens_BL, tokens_BL, mask_BT, ~mask_BT[:, 0], texts, texts, {}),
            rewards=RewardTable(NAMES, (True,) * len(NAMES), wins_BN, wins_BN),
            valid_BN=wins_BN.isfinite(),
            mask_BT=mask_BT,
            behaviour_logprobs_BT=nothing_BT,
            reference_logprobs_BT=nothing_BT,
            advantages_BTN=wins_BN.unsqueeze(1),
            returns_BTN=None,
            values_BTN=None,
            tokens_per_row=1.0,
            group_B=torch.arange(len(wins_BN)) // size,
            wins_BN=wins_BN,
            log_policy_B=log_ratio_XR[self.prompt_B, self.response_B].float(),
        )

    def choice(self, log_ratio_XR: Tensor, size: int) -> Tensor:
        """Second objective's label of the policy's choice for each prompt: what ``PreferenceRows.evaluate`` gives."""
        group_B = torch.arange(len(self.wins_BN)) // size
        weight_B = group_softmax(log_ratio_XR[self.prompt_B, self.response_B].float(), group_B)
        return group_sum(weight_B * self.wins_BN[:, 1], group_B)


class Table:
    """A policy of one probability for each response, relative to those of the data."""

    def __init__(self, settings: Settings) -> None:
        self.window = settings.window
        self.sums_XR, self.counts_XR = (
            torch.full((settings.prompts, settings.pool), 1e-2, dtype=torch.float64) for _ in range(2)
        )

    @property
    def log_ratio_XR(self) -> Tensor:
        """Logarithm of the policy over the data's, which is uniform."""
        ratio_XR = self.sums_XR / self.counts_XR
        return (ratio_XR / ratio_XR.mean(1, keepdim=True)).log()

    def fit(self, rows: Rows, weight_B: Tensor, kept_B: Tensor) -> None:
        """The maximiser of the weighted likelihood over the window: each response's mean weight."""
        place_B = (rows.prompt_B * self.sums_XR.shape[1] + rows.response_B)[kept_B]
        for total_XR, value_B in ((self.sums_XR, weight_B[kept_B]), (self.counts_XR, torch.ones(len(place_B)))):
            total_XR.mul_(self.window).view(-1).index_add_(0, place_B, value_B.double())


def train(problem: Problem, settings: Settings | None = None) -> Outcome:
    """Train a policy by the combiner; what it believed, and what is true."""
    s, size = settings or Settings(), problem.responses
    generator = torch.Generator().manual_seed(problem.seed)
    matrices = [win_matrices(kind, s.prompts, s.pool, generator) for kind in ("Bradley-Terry", problem.second)]
    world, exact = World(torch.stack(matrices), generator), replace(problem, votes=False, missing="nothing")
    combiner = MOPO(
        thresholds={"second": problem.threshold},
        tau=s.tau,
        dual=Projected(lr=s.dual_rate),
        patience=s.steps + 1,  # its warnings are another matter
        dual_values=problem.dual_values,
    )
    state, table = combiner.init(NAMES, torch.ones(len(NAMES))), Table(s)
    held_out = world.rows(s.held_out, problem)

    def evaluate() -> Tensor:
        """Labels of the policy's choice for each held-out prompt that has all of them."""
        labels_B = held_out.choice(table.log_ratio_XR, size).double()
        return labels_B[labels_B.isfinite()]

    def truth(rows: int) -> tuple[float, float, float]:
        """Of the policy as it is: its choice, and what it samples, under the second objective and the first."""
        first, second = (table.log_ratio_XR.exp().unsqueeze(2) * world.true_XRN).mean((0, 1)).tolist()
        return float(world.rows(rows, exact).choice(table.log_ratio_XR, size).mean()), second, first

    seen = []
    for step in range(s.steps):
        rows = world.rows(s.batch, problem)
        batch = rows.experience(table.log_ratio_XR, size)
        state = combiner.observe(batch, state)
        if step >= s.steps - s.averaged:
            seen.append([*(float(state[name][1]) for name in ("believed", "values", "duals")), *truth(2000)])
        table.fit(rows, combiner.combine(batch, state).score, batch.mask_BT[:, 0])
        if (step + 1) % s.interval == 0:
            state = combiner.observe_evaluation(torch.tensor([torch.nan, float(evaluate().mean())]), state)
    believed, values, dual, choice, policy, first = torch.tensor(seen).mean(0).tolist()
    last_choice, last_policy, _ = truth(20_000)
    labels_B = evaluate()
    mean, error = float(labels_B.mean()), float(labels_B.std() / len(labels_B) ** 0.5)
    return Outcome(believed, values, choice, policy, last_choice, last_policy, mean, error, dual, first)


VOTES = [
    Problem(second, responses, threshold, seed=0, dual_values=dual_values)
    for second, threshold in (("coin", 0.55), ("Condorcet", 0.55), ("Bradley-Terry", 0.55), ("Bradley-Terry", 0.45))
    for responses in (2, 4, 8)
    for dual_values in ("optimum", "policy", "held_out")
]
PATTERNS: tuple[Missing, ...] = ("nothing", "one response", "objective", "comparisons", "prompt")
MISSING = [
    Problem("Bradley-Terry", 4, 0.55, seed=0, votes=False, missing=missing, dual_values=dual_values)
    for missing in PATTERNS
    for dual_values in ("optimum", "policy", "held_out")
]
PRECISE = Settings(batch=1024, steps=100, averaged=40, held_out=20_000)


Found = list[tuple[Problem, list[Outcome]]]


def study(problems: Sequence[Problem], seeds: int, jobs: int, settings: Settings) -> Found:
    """Each problem with so many seeds."""
    tasks = [replace(problem, seed=seed) for problem in problems for seed in range(seeds)]
    if jobs == 1:
        found = [_train_alone(task, settings) for task in tasks]
    else:
        with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
            found = list(pool.map(_train_alone, tasks, [settings] * len(tasks), chunksize=4))
    return [(problem, found[i * seeds : (i + 1) * seeds]) for i, problem in enumerate(problems)]


def _train_alone(problem: Problem, settings: Settings) -> Outcome:
    torch.set_num_threads(1)  # the tensors are small
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "MOPO's labels")
        return train(problem, settings)


def print_votes(found: Found) -> None:
    """Means over the seeds, and how many thresholds were called met, and how many of these were not."""
    print(
        f"\nVotes, {len(found[0][1])} problems a line.\n\n{'second':14}{'K':>3}{'threshold':>11}{'dual values':>13}"
        f"{'believed':>10}{'values':>8}{'choice':>8}{'policy':>8}{'held out':>10}{'first':>7}{'multiplier':>12}"
        f"{'believed met':>14}{'false':>7}{'met':>5}{'false':>7}"
    )
    for problem, outcomes in found:
        mean, b = mean_of(outcomes), problem.threshold
        believed, met = ([o for o in outcomes if o.believed_met(b)], [o for o in outcomes if o.met(b)])
        print(
            f"{problem.second:14}{problem.responses:>3}{b:>11}{problem.dual_values:>13}{mean['believed']:>10.3f}"
            f"{mean['values']:>8.3f}{mean['choice']:>8.3f}{mean['policy']:>8.3f}{mean['held_out']:>10.3f}"
            f"{mean['first']:>7.3f}{mean['dual']:>12.2f}{len(believed):>14}{false(believed, b):>7}"
            f"{len(met):>5}{false(met, b):>7}"
        )


def false(called_met: Sequence[Outcome], threshold: float) -> int:
    """How many of them have a last policy whose choice is worth less than the threshold."""
    return sum(o.last_choice < threshold for o in called_met)


def print_missing(found: Found) -> None:
    """How far the truth lies from the values that moved the multiplier."""
    print(
        f"\nMissing labels, {len(found[0][1])} problems a line, {found[0][0].share:.0%} missing; threshold "
        f"{found[0][0].threshold}, K = {found[0][0].responses}, probabilities.\n\n{'missing':14}{'dual values':>13}"
        f"{'values':>8}{'choice':>8}{'policy':>8}"
        + "".join(f"{name:>17}{'largest':>9}" for name in ("choice - values", "policy - values"))
    )
    for problem, outcomes in found:
        mean = mean_of(outcomes)
        gaps = [[getattr(o, name) - o.values for o in outcomes] for name in ("choice", "policy")]
        told = "".join(f"{sum(gap) / len(gap):>+17.4f}{max(gap, key=abs):>+9.4f}" for gap in gaps)
        print(
            f"{problem.missing:14}{problem.dual_values:>13}{mean['values']:>8.3f}{mean['choice']:>8.3f}"
            f"{mean['policy']:>8.3f}{told}"
        )


def mean_of(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Mean of each field."""
    rows = [asdict(outcome) for outcome in outcomes]
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


def as_rows(found: Found) -> list[dict[str, Any]]:
    """One row for each run."""
    return [
        {**asdict(replace(problem, seed=seed)), **asdict(outcome)}
        for problem, outcomes in found
        for seed, outcome in enumerate(outcomes)
    ]
