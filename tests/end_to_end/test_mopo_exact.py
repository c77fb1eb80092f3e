"""A small neural policy, trained on sampled comparisons, reaches the exact constrained optimum."""

from dataclasses import replace

import cvxpy as cp
import numpy as np
import pytest
from transformers.utils import logging as transformers_logging

from bench.mopo.learned import Recipe, learn, prior, total_variation, write_policy
from bench.mopo.structures import (
    OTHER_PROMPTS,
    PROMPT,
    STRUCTURES,
    condorcet_cycle,
    near_deterministic,
    solve,
    total_conflict,
)

TAU = 0.1
RECIPE = Recipe(tau=TAU, comparisons=50_000)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    transformers_logging.disable_progress_bar()
    return write_policy(tmp_path_factory.mktemp("policy"))


def thresholds(structure, prior_K, share):
    """That share of the way from what the unconstrained optimum gives to the most that one response has."""
    free_M = solve(structure, np.zeros(len(structure.wins) - 1), TAU, prior_K).values_N[1:]
    return free_M + share * (structure.wins_KN.numpy()[:, 1:].max(0) - free_M)


@pytest.mark.parametrize("build", STRUCTURES, ids=lambda build: build.__name__)
def test_a_policy_trained_on_samples_reaches_the_exact_optimum(build, folder, tmp_path):
    structure = build()
    prior_K = prior(folder, structure)
    wanted_M = thresholds(structure, prior_K, 0.4)
    exact = solve(structure, wanted_M, TAU, prior_K)
    unconstrained = solve(structure, np.zeros_like(wanted_M), TAU, prior_K)
    # Neither the start nor the optimum without constraints would pass.
    assert exact.feasible
    assert total_variation(exact.policy_K, prior_K) > 0.1
    assert total_variation(exact.policy_K, unconstrained.policy_K) > 0.05

    (learned,) = learn(folder, [structure], wanted_M, RECIPE, 0, tmp_path)
    assert total_variation(learned.policy_K, exact.policy_K) <= 0.02
    assert learned.outside <= 0.01
    np.testing.assert_allclose(learned.policy_K @ structure.wins_KN.numpy()[:, 1:], wanted_M, atol=5e-3)


def test_several_prompts_share_one_multiplier(folder, tmp_path):
    """The threshold holds on the mean over the prompts: some stay below it so that others, at less cost, lie above."""
    built = [total_conflict(), near_deterministic(), condorcet_cycle()]
    structures = [replace(s, prompt=prompt) for s, prompt in zip(built, (PROMPT, *OTHER_PROMPTS), strict=True)]
    priors, wins = [prior(folder, s) for s in structures], [s.wins_KN.numpy() for s in structures]
    policies = [cp.Variable(len(prior_K)) for prior_K in priors]
    wanted = 0.55
    objective = sum(
        w[:, 0] @ policy - TAU * cp.sum(cp.rel_entr(policy, prior_K))
        for w, policy, prior_K in zip(wins, policies, priors, strict=True)
    )
    second = sum(w[:, 1] @ policy for w, policy in zip(wins, policies, strict=True)) / 3
    constraint = second >= wanted
    cp.Problem(cp.Maximize(objective / 3), [constraint, *(cp.sum(policy) == 1 for policy in policies)]).solve(
        solver=cp.CLARABEL
    )
    assert constraint.dual_value > 0.3
    found = learn(folder, structures, np.array([wanted]), RECIPE, 0, tmp_path)
    assert float(found[0].duals_M[0]) == pytest.approx(float(constraint.dual_value), abs=0.02)
    for learned, policy in zip(found, policies, strict=True):
        assert total_variation(learned.policy_K, policy.value) <= 0.02
    reached = [float(learned.policy_K @ w[:, 1]) for learned, w in zip(found, wins, strict=True)]
    assert min(reached) < wanted - 0.02 < wanted + 0.02 < max(reached)
