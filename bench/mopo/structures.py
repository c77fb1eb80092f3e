"""Preference structures whose constrained optimum is known: who beats whom, on six to eight responses.

A structure is given by one win matrix per objective, the primary one first. The optimum needs no more of them than
each response's mean win probability against the others, and a general convex solver finds it.

Legend: K responses, N objectives, M secondary objectives, B thresholds of a sweep.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import cvxpy as cp
import numpy as np
import torch
from torch import Tensor

from moa_lightning.functional import one_shot_dual
from moa_lightning.functional.preference import mean_wins

Array = np.ndarray
PROMPT = "which answer"
OTHER_PROMPTS = ("what now", "and then")
RESPONSES = ("yes please", "no thanks", "maybe so", "ask me", "of course not", "try it", "not now", "never again")


@dataclass(frozen=True)
class Structure:
    """Pairwise win probabilities of one finite problem, exact."""

    name: str
    says: str  # in one line, for the figure
    wins: dict[str, Tensor]  # (K, K) by objective, float64; wins[i][j] is the probability that i beats j
    prompt: str = PROMPT

    @property
    def responses(self) -> tuple[str, ...]:
        """The texts that stand for the K responses."""
        return RESPONSES[: len(next(iter(self.wins.values())))]

    @property
    def wins_KN(self) -> Tensor:
        """Mean win probability of each response against the others, under each objective."""
        return torch.stack([mean_wins(wins_KK) for wins_KK in self.wins.values()], 1)


@dataclass(frozen=True)
class Point:
    """A policy on the K responses, and what it is worth."""

    feasible: bool
    policy_K: Array
    values_N: Array  # mean win probability of each objective; the primary one first
    objective: float  # the primary value less tau times the KL divergence from the prior


def transitive(scores: Sequence[float], scale: float = 1.0) -> Tensor:
    """Bradley and Terry's win matrix of these scores."""
    scores_K = torch.tensor(scores, dtype=torch.float64) / scale
    return (scores_K.unsqueeze(1) - scores_K).sigmoid()


def agreement() -> Structure:
    """Both objectives have the same order, at different distances."""
    primary, second = [1.6, 1.3, 0.6, 0.0, -0.8, -1.5], [2.1, 0.7, 0.3, 0.0, -1.4, -1.6]
    return Structure("agreement", "one order for both", {"first": transitive(primary), "second": transitive(second)})


def total_conflict() -> Structure:
    """Whoever wins under one objective loses under the other, by as much."""
    wins_KK = transitive([1.8, 1.1, 0.4, -0.3, -1.0, -1.9])
    return Structure("total conflict", "what one wins the other loses", {"first": wins_KK, "second": wins_KK.T})


def partial_conflict() -> Structure:
    """Specialists for each objective, compromises between them, and responses that are bad for both."""
    primary, second = [2.2, 1.7, 1.0, 0.2, -0.6, -1.2, -1.4], [-1.6, 0.3, 1.0, 1.6, 2.0, -1.0, -1.5]
    wins = {"first": transitive(primary), "second": transitive(second)}
    return Structure("partial conflict", "specialists, compromises, bad ones", wins)


def three_objectives() -> Structure:
    """A specialist for each of three objectives, compromises for each two, one all-rounder and a bad response."""
    scores = {
        "first": [2.2, -0.8, -1.2, 1.2, 0.9, -0.9, 0.5, -1.6],
        "second": [-1.0, 2.1, -0.7, 1.0, -0.9, 1.1, 0.6, -1.5],
        "third": [-0.9, -1.1, 2.0, -0.8, 1.2, 1.0, 0.4, -1.4],
    }
    return Structure("three objectives", "two constraints", {name: transitive(s) for name, s in scores.items()})


def condorcet_cycle() -> Structure:
    """The primary objective goes round in a circle among its three best: no scores explain it."""
    first_KK = transitive([1.0, 1.0, 1.0, -0.2, -0.8, -1.4])
    for winner, loser, probability in ((0, 1, 0.9), (1, 2, 0.8), (2, 0, 0.7)):
        first_KK[winner, loser], first_KK[loser, winner] = probability, 1 - probability
    second_KK = transitive([-1.2, 0.1, 0.4, 1.5, 0.9, -0.9])
    return Structure("Condorcet cycle", "0 beats 1 beats 2 beats 0", {"first": first_KK, "second": second_KK})


def near_deterministic() -> Structure:
    """The better one wins 99 times in 100, under both objectives, whose orders partly disagree."""

    def ranked(ranks: Sequence[float]) -> Tensor:
        return 0.5 + 0.49 * (torch.tensor(ranks).unsqueeze(1) - torch.tensor(ranks)).sign().double()

    wins = {"first": ranked([6, 5, 4, 3, 2, 1]), "second": ranked([2, 1, 5, 6, 4, 3])}
    return Structure("near-deterministic", "the better one wins 99 in 100", wins)


def ties() -> Structure:
    """Nothing but wins, losses and draws between three classes, which the objectives draw differently."""

    def classes(members: Sequence[int]) -> Tensor:
        return 0.5 + 0.35 * (torch.tensor(members).unsqueeze(1) - torch.tensor(members)).sign().double()

    wins = {"first": classes([2, 2, 1, 1, 0, 0]), "second": classes([0, 0, 1, 1, 1, 2])}
    return Structure("ties", "three classes, draws within", wins)


STRUCTURES: tuple[Callable[[], Structure], ...] = (
    agreement,
    total_conflict,
    partial_conflict,
    three_objectives,
    condorcet_cycle,
    near_deterministic,
    ties,
)


def divergence(policy_K: Array, prior_K: Array) -> float:
    """KL(policy | prior) in nats."""
    kept = policy_K > 0
    return float((policy_K[kept] * np.log(policy_K[kept] / prior_K[kept])).sum())


def evaluate(policy_K: Array, structure: Structure, tau: float, prior_K: Array, feasible: bool = True) -> Point:
    """What a policy is worth under the structure's true preferences."""
    values_N = policy_K @ structure.wins_KN.numpy()
    return Point(feasible, policy_K, values_N, float(values_N[0]) - tau * divergence(policy_K, prior_K))


def solve(structure: Structure, thresholds_M: Array, tau: float, prior_K: Array) -> Point:
    """The constrained optimum by a general convex solver, which knows nothing of the dual."""
    wins_KN = structure.wins_KN.numpy()
    policy = cp.Variable(len(wins_KN))
    objective = cp.Maximize(wins_KN[:, 0] @ policy - tau * cp.sum(cp.rel_entr(policy, prior_K)))
    problem = cp.Problem(objective, [cp.sum(policy) == 1, policy @ wins_KN[:, 1:] >= thresholds_M])
    problem.solve(solver=cp.CLARABEL, tol_gap_abs=1e-10, tol_gap_rel=1e-10, tol_feas=1e-10)
    if problem.status != cp.OPTIMAL:
        return evaluate(prior_K, structure, tau, prior_K, feasible=False)
    policy_K = np.maximum(policy.value, 0)
    return evaluate(policy_K / policy_K.sum(), structure, tau, prior_K)


def mopo(structure: Structure, thresholds_M: Array, tau: float, prior_K: Array) -> Point:
    """The same by this project's dual."""
    wins_KN, prior = structure.wins_KN, torch.as_tensor(prior_K)
    solution = one_shot_dual(wins_KN[:, 0], wins_KN[:, 1:], torch.as_tensor(thresholds_M), tau, log_prior_B=prior.log())
    return evaluate((solution.ratio * prior).numpy(), structure, tau, prior_K, solution.feasible)


def sweep(structure: Structure, tau: float, prior_K: Array, count: int) -> Array:
    """Thresholds (B, M): from a little below what the unconstrained optimum gives to near the most that there is.

    With two secondary objectives these are the points of a grid, ``count`` in each direction, and some of them exclude
    each other.
    """
    free = solve(structure, np.zeros(len(structure.wins) - 1), tau, prior_K).values_N[1:]
    most = structure.wins_KN.numpy()[:, 1:].max(0)
    shares = np.linspace(-0.15, 0.95, count)
    axes = [low + shares * (high - low) for low, high in zip(free, most, strict=True)]
    return np.stack([axis.flatten() for axis in np.meshgrid(*axes, indexing="ij")], 1)


def write_comparisons(structures: Sequence[Structure], per_pair: int, seed: int, file: Path) -> None:
    """Rows of preference data (format ``Candidates``): each pair compared so often, each time by a biased coin."""
    generator = np.random.default_rng(seed)
    lines = []
    for structure in structures:
        preferences = {}
        for name, wins_KK in structure.wins.items():
            upper = np.triu(generator.binomial(per_pair, wins_KK.numpy()) / per_pair, 1)
            matrix = upper + np.tril(1 - upper.T, -1) + 0.5 * np.eye(len(upper))
            preferences[name] = {"wins": matrix.tolist()}
        row = {"prompt": structure.prompt, "responses": list(structure.responses), "preferences": preferences}
        lines.append(json.dumps(row) + "\n")
    file.write_text("".join(lines), encoding="utf-8")
