"""The one-shot dual over several prompts: optimal by its own certificate, and as good as what a solver finds."""

import cvxpy as cp
import numpy as np
import pytest
import torch
from scipy.special import logsumexp

from moa_lightning.functional import one_shot_dual
from moa_lightning.functional.dual import without_prompt_effects

EXACT = {"tol_gap_abs": 1e-12, "tol_gap_rel": 1e-12, "tol_feas": 1e-12}


def problem(seed):
    """2-5 prompts with 1-6 responses each, 1-3 constraints in units of their own, that a random policy meets."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    def number(low, high):
        return int(torch.randint(low, high, (1,), generator=generator))

    sizes = [number(1, 7) for _ in range(number(2, 6))]
    group_B = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    units_M = 10.0 ** torch.tensor([number(-4, 5) for _ in range(number(1, 4))]).double()
    primary_B, secondary_BM, log_prior_B = draw(sum(sizes)), draw(sum(sizes), len(units_M)), 2 * draw(sum(sizes))
    witness_B = torch.cat([(5 * draw(size)).softmax(0) for size in sizes]) / len(sizes)
    thresholds_M = witness_B @ secondary_BM - 0.002
    order = torch.randperm(len(group_B), generator=generator)  # the rows of a prompt need not stand together
    names_B = torch.tensor([7, 2, 30, 4, 0])[group_B]  # nor prompts be numbered without gaps
    return (
        primary_B[order],
        (secondary_BM * units_M)[order],
        thresholds_M * units_M,
        (0.05, 0.2, 1.0)[seed % 3],
        names_B[order],
        log_prior_B[order],
    ), units_M


def objective(policy_B, primary_B, beta, prior_B):
    return policy_B @ primary_B - beta * (policy_B * np.log(np.maximum(policy_B, 1e-300) / prior_B)).sum()


# The general solver warns where it falls short of 1e-12; the certificate of ours below needs no solver.
@pytest.mark.filterwarnings("ignore:Solution may be inaccurate:UserWarning")
@pytest.mark.parametrize("first", range(0, 60, 20))
def test_agrees_with_a_general_convex_solver(first):
    active = 0
    for seed in range(first, first + 20):
        given, units_M = problem(seed)
        found = one_shot_dual(*given)
        r, g, b, beta, group, log_prior = (x.numpy() if torch.is_tensor(x) else x for x in given)
        prompts = np.unique(group)
        prior = np.exp(log_prior) / np.array([np.exp(log_prior[group == x]).sum() for x in group])
        policy, (g, b) = cp.Variable(len(r)), (x / units_M.numpy() for x in (g, b))
        meets = policy @ g / len(prompts) >= b
        simplex = [cp.sum(policy[group == x]) == 1 for x in prompts]
        best = cp.Problem(
            cp.Maximize((r @ policy - beta * cp.sum(cp.rel_entr(policy, prior))) / len(prompts)), [meets, *simplex]
        )
        best.solve(solver=cp.CLARABEL, **EXACT)
        ours, duals = prior * found.ratio.numpy(), (found.duals * units_M).numpy()
        assert found.feasible
        assert (found.values >= given[2] - 1e-10 * units_M).all()
        # The closed form for these multipliers; the dual function there is above what any policy reaches.
        scores = np.log(prior) + (r + (g - b) @ duals) / beta
        of_prompts = {x: logsumexp(scores[group == x]) for x in prompts}
        np.testing.assert_allclose(ours, np.exp(scores - [of_prompts[x] for x in group]), rtol=0, atol=1e-12)
        np.testing.assert_allclose(found.values / units_M, ours @ g / len(prompts), rtol=0, atol=1e-12)
        assert (duals >= 0).all()
        bound = beta * np.mean(list(of_prompts.values()))
        assert float(found.value) == pytest.approx(bound, abs=1e-12)
        assert bound == pytest.approx(
            objective(ours, r, beta, prior) / len(prompts), abs=1e-10
        )  # no gap, so no policy is better
        assert np.abs(ours @ g / len(prompts) - b)[duals > 1e-3].max(initial=0) < 1e-10
        # The solver's policy: its Lagrangian lies beta KL(theirs | optimum) below that, a mean over the prompts, and
        # Pinsker bounds how far apart the two are for each. Round-off in the gap, 1e-16, is 1e-7 there.
        theirs = np.maximum(policy.value, 0)
        theirs = theirs / np.array([theirs[group == x].sum() for x in group])
        gap = bound - objective(theirs, r, beta, prior) / len(prompts) - duals @ (theirs @ g / len(prompts) - b)
        assert -1e-12 < gap < 1e-7
        assert (theirs @ g / len(prompts) >= b - 1e-7).all()
        for x in prompts:
            apart = np.abs(ours - theirs)[group == x].sum()
            assert apart <= np.sqrt(2 * len(prompts) * max(gap, 0.0) / beta) + 1e-6
        active += int((duals > 1e-3).sum())
    assert active > 10


@pytest.mark.parametrize("seed", range(10))
def test_thresholds_beyond_the_best_responses_are_infeasible(seed):
    (r, g, b, beta, group, log_prior), _ = problem(seed)
    best_M = torch.stack([g[group == x].amax(0) for x in group.unique()]).mean(0)
    near, beyond = b.clone(), b.clone()
    near[0], beyond[0] = best_M[0] * (1 - 1e-6), best_M[0] * (1 + 1e-6)
    alone = one_shot_dual(r, g[:, :1], near[:1], beta, group, log_prior)
    assert alone.feasible
    torch.testing.assert_close(alone.values, near[:1], rtol=1e-6, atol=0)
    found = one_shot_dual(r, g, beyond, beta, group, log_prior)
    assert not found.feasible
    assert found.ratio.isfinite().all()
    assert found.duals[0] > 0


def test_copies_of_a_prompt_change_nothing():
    generator = torch.Generator().manual_seed(0)
    p_B, q_BM, b_M = torch.rand(5, generator=generator), torch.rand(5, 2, generator=generator), torch.tensor([0.6, 0.5])
    one = one_shot_dual(p_B, q_BM, b_M, 0.1)
    assert one.duals.max() > 0.1
    copies = one_shot_dual(p_B.repeat(3), q_BM.repeat(3, 1), b_M, 0.1, torch.arange(3).repeat_interleave(5))
    torch.testing.assert_close(copies.duals, one.duals)
    torch.testing.assert_close(copies.ratio, one.ratio.repeat(3))
    torch.testing.assert_close(copies.value, one.value)


def test_a_response_that_the_reference_never_gives_takes_no_part():
    r_B, g_BM, never_B = torch.tensor([1.0, 0.0, 9.0]), torch.tensor([[0.0], [1.0], [9.0]]), torch.zeros(3)
    never_B[2] = -torch.inf
    with_it = one_shot_dual(r_B, g_BM, torch.tensor([0.7]), 0.5, log_prior_B=never_B)
    without = one_shot_dual(r_B[:2], g_BM[:2], torch.tensor([0.7]), 0.5)
    torch.testing.assert_close(with_it.duals, without.duals)
    torch.testing.assert_close(with_it.values, torch.tensor([0.7]))


def test_settings_without_meaning_are_refused():
    with pytest.raises(ValueError, match="beta must be above 0"):
        one_shot_dual(torch.zeros(3), torch.zeros(3, 1), torch.zeros(1), 0.0)
    with pytest.raises(ValueError, match="secondary scores"):
        one_shot_dual(torch.zeros(3), torch.zeros(3, 1), torch.zeros(2), 0.1)


def test_the_responses_to_one_prompt_keep_their_scores():
    (primary_B, secondary_BM, *_), _ = problem(0)
    scores_BM = torch.cat([primary_B.unsqueeze(1), secondary_BM], 1)
    alone = without_prompt_effects(scores_BM, torch.zeros(len(scores_BM)).long(), torch.zeros(len(scores_BM)).double())
    torch.testing.assert_close(alone, scores_BM, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("level", [0.0, 0.5, 100.0])
def test_the_levels_of_prompts_are_taken_off_and_the_spread_within_them_kept(level):
    generator = torch.Generator().manual_seed(0)
    group_B, log_prior_B = torch.arange(300).repeat_interleave(4), torch.zeros(1200).double()
    noise_B1 = torch.randn(1200, 1, generator=generator, dtype=torch.float64)
    level_G1 = level * torch.randn(300, 1, generator=generator, dtype=torch.float64)
    scores_B1 = noise_B1 + level_G1[group_B]
    found_B1 = without_prompt_effects(scores_B1, group_B, log_prior_B)
    assert float(found_B1.mean()) == pytest.approx(float(scores_B1.mean()), abs=1e-9)
    assert float(found_B1.std()) == pytest.approx(1.0, rel=0.05)
    # The prompts' means differ by no more than those of 4 responses do by chance, 1/2.
    assert float(found_B1.view(300, 4).mean(1).std()) < 0.55


def test_responses_that_the_reference_gives_more_often_weigh_more():
    """One response listed thrice is one of three times the weight, in the levels too."""
    scores_B1 = torch.tensor([[1.0], [1.0], [1.0], [5.0], [2.0], [2.0], [2.0], [9.0]]).double()
    group_B = torch.arange(2).repeat_interleave(4)
    listed_B1 = without_prompt_effects(scores_B1, group_B, torch.zeros(8).double())
    rows_B = torch.tensor([0, 3, 4, 7])
    log_prior_B = torch.tensor([3.0, 1.0, 3.0, 1.0]).double().log()
    weighed_B1 = without_prompt_effects(scores_B1[rows_B], group_B[rows_B], log_prior_B)
    mean = (log_prior_B.view(2, 2).softmax(1).view(-1, 1) * weighed_B1).sum() / 2
    assert float(mean) == pytest.approx(float(listed_B1.mean()))
