"""MOPO's closed forms: optimal by their own certificate, and as good as what a general convex solver finds.

A solver that stops at an objective gap of 1e-10 may be 1e-5 off in a probability, and where it stops depends on the
processor. So its policy is held to the distance that its objective allows, and ours to the dual's bound.
"""

import cvxpy as cp
import numpy as np
import pytest
import torch
from scipy.special import logsumexp

from moa_lightning.functional import mopo_policy, one_shot_dual, robust_value
from tests.functional.closed_forms import mopo_ratio

EXACT = {"tol_gap_abs": 1e-10, "tol_gap_rel": 1e-10, "tol_feas": 1e-10}


def problem(seed):
    """3-8 responses, 2-5 objectives, a random prior, and thresholds that a random policy meets."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    responses = int(torch.randint(3, 9, (1,), generator=generator))
    secondary = int(torch.randint(1, 5, (1,), generator=generator))
    primary_B, secondary_BM = draw(responses), draw(responses, secondary)
    log_prior_B = (3 * draw(responses)).log_softmax(0)
    witness_B = (4 * draw(responses)).softmax(0)
    tau = (0.05, 0.08, 0.3, 1.0)[seed % 4]
    return primary_B, secondary_BM, witness_B @ secondary_BM - 0.01, tau, log_prior_B


def value(policy_B, primary_B, tau, prior_B):
    kept = policy_B > 0
    return policy_B @ primary_B - tau * (policy_B[kept] * np.log(policy_B[kept] / prior_B[kept])).sum()


@pytest.mark.parametrize("first", range(0, 200, 20))
def test_the_dual_agrees_with_a_general_convex_solver(first):
    bound = 0
    for seed in range(first, first + 20):
        primary_B, secondary_BM, thresholds_M, tau, log_prior_B = problem(seed)
        solution = one_shot_dual(primary_B, secondary_BM, thresholds_M, tau, log_prior_B=log_prior_B)
        p, q, b, prior = (x.numpy() for x in (primary_B, secondary_BM, thresholds_M, log_prior_B.exp()))
        policy = cp.Variable(len(p))
        objective = cp.Maximize(p @ policy - tau * cp.sum(cp.rel_entr(policy, prior)))
        cp.Problem(objective, [cp.sum(policy) == 1, policy @ q >= b]).solve(solver=cp.CLARABEL, **EXACT)
        theirs = np.maximum(policy.value, 0) / np.maximum(policy.value, 0).sum()
        ours, duals = prior * solution.ratio.numpy(), solution.duals.numpy()
        assert solution.feasible
        # The closed form for these multipliers; the dual function there is above what any policy reaches.
        scores = np.log(prior) + (p + q @ duals) / tau
        np.testing.assert_allclose(ours, np.exp(scores - logsumexp(scores)), rtol=0, atol=1e-12)
        np.testing.assert_allclose(solution.values.numpy(), ours @ q, rtol=0, atol=1e-12)
        assert (duals >= 0).all()
        best = tau * logsumexp(scores) - b @ duals
        assert value(ours, p, tau, prior) == pytest.approx(best, abs=1e-10)  # no gap: no policy is better
        slack = ours @ q - b
        assert (slack >= -1e-9).all()
        assert np.abs(slack[duals > 1e-3]).max(initial=0) < 1e-9
        # The solver's policy: its Lagrangian lies tau KL(theirs | optimum) below the best, and Pinsker bounds how far
        # apart the two are. Round-off in the gap, 1e-16, is 1e-7 there.
        gap = best - value(theirs, p, tau, prior) - duals @ (theirs @ q - b)
        assert -1e-12 < gap < 1e-7
        assert np.abs(ours - theirs).sum() <= np.sqrt(2 * max(gap, 0.0) / tau) + 1e-6
        assert (theirs @ q >= b - 1e-7).all()
        bound += int((duals > 1e-6).any())
    assert bound > 0, "no constraint of these problems is active; they test nothing"


@pytest.mark.parametrize("tau", [0.3, 0.03, 0.001])
@pytest.mark.parametrize("margin", [0.02, 1e-3, 1e-7])
def test_thresholds_that_hardly_any_policy_meets_are_met(tau, margin):
    # Near the edge of what is feasible the policy is next to deterministic, and the dual's curvature next to 0.
    generator = torch.Generator().manual_seed(3)
    for case in range(40):
        responses, secondary = (int(torch.randint(low, 9, (1,), generator=generator)) for low in (3, 1))
        primary_B = torch.rand(responses, generator=generator, dtype=torch.float64)
        secondary_BM = torch.rand(responses, secondary, generator=generator, dtype=torch.float64)
        if case % 4 == 0:  # labels that are certain
            secondary_BM = (secondary_BM > 0.5).double() * 0.98 + 0.01
        witness_B = torch.randn(responses, generator=generator, dtype=torch.float64).mul(3).softmax(0)
        thresholds_M = witness_B @ secondary_BM - margin
        solution = one_shot_dual(primary_B, secondary_BM, thresholds_M, tau)
        assert solution.feasible
        assert (solution.values >= thresholds_M - 1e-7).all()
        assert (solution.duals * (solution.values - thresholds_M)).abs().max() < 1e-6


def test_without_a_constraint_the_primary_objective_alone_decides():
    primary_B = torch.tensor([0.8, 0.5, 0.2], dtype=torch.float64)
    solution = one_shot_dual(primary_B, torch.zeros(3, 0).double(), torch.zeros(0).double(), 0.1)
    torch.testing.assert_close(solution.ratio / 3, (primary_B / 0.1).softmax(0))
    assert solution.feasible


@pytest.mark.parametrize("seed", range(20))
def test_infeasible_thresholds_are_found(seed):
    primary_B, secondary_BM, thresholds_M, tau, log_prior_B = problem(seed)
    beyond_M = thresholds_M.clone()
    beyond_M[0] = secondary_BM[:, 0].max() + 1e-3
    solution = one_shot_dual(primary_B, secondary_BM, beyond_M, tau, log_prior_B=log_prior_B)
    assert not solution.feasible
    assert torch.isfinite(solution.ratio).all()
    if secondary_BM.shape[1] == 1:  # the nearest policy is the best one for that objective
        torch.testing.assert_close(solution.values[0], secondary_BM[:, 0].max(), atol=1e-6, rtol=0)


def test_thresholds_that_exclude_each_other_are_infeasible():
    secondary_BM = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    primary_B = torch.zeros(2)
    assert one_shot_dual(primary_B, secondary_BM, torch.tensor([0.4, 0.5]), 0.1).feasible
    assert not one_shot_dual(primary_B, secondary_BM, torch.tensor([0.6, 0.5]), 0.1).feasible


def test_responses_outside_the_prior_do_not_help():
    log_prior_B = torch.tensor([0.0, 0.0, -torch.inf])
    secondary_BM = torch.tensor([[0.1], [0.2], [0.9]])
    solution = one_shot_dual(torch.zeros(3), secondary_BM, torch.tensor([0.5]), 0.1, log_prior_B=log_prior_B)
    assert not solution.feasible
    assert one_shot_dual(torch.zeros(3), secondary_BM, torch.tensor([0.15]), 0.1, log_prior_B=log_prior_B).feasible


def test_the_one_shot_dual_of_the_literature():
    """r = (1, 0, 0), h = (-1, 1, 0), equally likely, beta 0.5, threshold 0: lambda* = 0.5."""
    solution = one_shot_dual(
        torch.tensor([1.0, 0.0, 0.0]), torch.tensor([[-1.0], [1.0], [0.0]]), torch.tensor([0.0]), beta=0.5
    )
    assert solution.duals.item() == pytest.approx(0.5, abs=1e-5)
    torch.testing.assert_close(solution.ratio / 3, torch.tensor([0.42232, 0.42232, 0.15536]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("tau", [1e-3, 0.08, 10.0])
def test_the_policy_adds_to_one_and_cannot_overflow(tau):
    primary_B, secondary_BM, _, _, log_prior_B = problem(5)
    wins_BN = torch.cat([primary_B.unsqueeze(1), secondary_BM], 1)
    weights_N = torch.full((wins_BN.shape[1],), 100.0).index_fill(0, torch.tensor(0), 1.0)
    policy_B = mopo_policy(wins_BN, weights_N, tau, log_prior_B)
    assert torch.isfinite(policy_B).all()
    assert float(policy_B.sum()) == pytest.approx(1)
    uniform_B = mopo_policy(wins_BN[:, :1], torch.ones(1), tau, torch.zeros_like(log_prior_B))
    torch.testing.assert_close(uniform_B, (primary_B / tau).softmax(0))


# The general solver warns where a tiny ball leaves it short of 1e-10; the comparison below is what decides.
@pytest.mark.filterwarnings("ignore:Solution may be inaccurate:UserWarning")
@pytest.mark.parametrize("radius", [1e-5, 1e-4, 1e-3, 1e-2, 0.05, 0.15, 0.5])
def test_the_robust_value_agrees_with_a_direct_minimisation(radius):
    for seed in range(12):
        values_B, _, _, _, log_prior_B = problem(seed)
        got, chi = robust_value(values_B, radius, log_prior_B)
        policy = cp.Variable(len(values_B))
        ball = cp.sum(cp.rel_entr(policy, log_prior_B.exp().numpy())) <= radius
        found = cp.Problem(cp.Minimize(values_B.numpy() @ policy), [cp.sum(policy) == 1, ball])
        found.solve(solver=cp.CLARABEL, **EXACT)
        assert float(got) == pytest.approx(found.value, abs=1e-6)
        if chi == 0:  # the ball reaches the smallest value alone
            assert float(got) == float(values_B.min())
            continue
        # Whatever the solver says: a distribution in the ball has this value, and the dual allows none below it.
        scores_B = log_prior_B - values_B / chi
        log_tilted_B = scores_B.log_softmax(0)
        assert float(log_tilted_B.exp() @ (log_tilted_B - log_prior_B)) == pytest.approx(radius, rel=1e-8)
        assert float(got) == pytest.approx(float(log_tilted_B.exp() @ values_B), abs=1e-12)
        assert float(got) == pytest.approx(float(-chi * scores_B.logsumexp(0) - chi * radius), abs=1e-12)


def test_the_robust_value_at_its_ends():
    values_B = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    mean, chi = robust_value(values_B, 0.0)
    assert float(mean) == pytest.approx(float(values_B.mean()))
    assert chi == torch.inf
    lowest, chi = robust_value(values_B, 2.0)  # log 3 nats already reach the smallest value alone
    assert (float(lowest), float(chi)) == (0.2, 0.0)
    same, chi = robust_value(torch.full((4,), 0.3), 0.1)
    assert float(same) == pytest.approx(0.3)
    with pytest.raises(ValueError, match="at least 0"):
        robust_value(values_B, -0.1)


def test_shapes_and_tau_are_checked():
    with pytest.raises(ValueError, match="secondary scores"):
        one_shot_dual(torch.zeros(3), torch.zeros(3, 2), torch.zeros(1), 0.1)
    with pytest.raises(ValueError, match="tau must be above 0"):
        mopo_policy(torch.zeros(3, 2), torch.ones(2), 0.0, torch.zeros(3))


def test_the_policy_is_the_prior_times_the_ratio_of_each_prompt():
    sizes, generator = (4, 1, 3), torch.Generator().manual_seed(3)
    wins_BN, log_prior_B = torch.rand(8, 3, generator=generator), torch.randn(8, generator=generator)
    group_B = torch.repeat_interleave(torch.arange(3), torch.tensor(sizes))
    weights_N = torch.tensor([1.0, 0.7, 2.0])
    policy_B = mopo_policy(wins_BN, weights_N, 0.1, log_prior_B, group_B)
    for prompt in range(3):
        rows = group_B == prompt
        ratio_B = mopo_ratio(wins_BN[rows, 0], wins_BN[rows, 1:], weights_N[1:], 0.1, log_prior_B[rows])
        torch.testing.assert_close(policy_B[rows], ratio_B * log_prior_B[rows].softmax(0))
    torch.testing.assert_close(
        mopo_policy(wins_BN[:4], weights_N, 0.1, log_prior_B[:4]), policy_B[:4], rtol=1e-5, atol=1e-7
    )
    with pytest.raises(ValueError, match="tau must be above 0"):
        mopo_policy(wins_BN, weights_N, 0.0, log_prior_B)
