"""CAID: the exact constrained optimum, primal and dual, where all responses are known; what it keeps and tells."""

import dataclasses
import math

import cvxpy as cp
import numpy as np
import pytest
import torch
from scipy.optimize import root

from moa_lightning.combiners import CAID, PAMA, PID, LogPID, Optimistic, Projected
from moa_lightning.losses import ClippedSurrogate, LossKL, RewardKL
from moa_lightning.rewards import Length, Objective, RewardPanel
from moa_lightning.signals import Signal
from moa_lightning.sources import Rollout
from moa_lightning.training.compatibility import check_compatible
from tests.combiners import scored

BETA = 0.2


def batch(scores_BN, group_B=None, beta=BETA, **fields):
    group_B = torch.zeros(len(scores_BN)).long() if group_B is None else group_B
    rows = scored.experience(torch.as_tensor(scores_BN, dtype=torch.float32), group_B)
    return dataclasses.replace(rows, kl_coefficient=beta, **fields)


def begin(combiner, objectives=2):
    return combiner.init("abc"[:objectives], torch.ones(objectives))


def score(combiner, rows, state):
    return combiner.combine(rows, state)


def problem(seed):
    """4 prompts with 5 responses each, three objectives; thresholds on two that a good policy just meets."""
    generator = torch.Generator().manual_seed(seed)
    scores_BN, group_B = torch.rand(20, 3, generator=generator), torch.arange(4).repeat_interleave(5)
    log_prior_B = torch.randn(4, 5, generator=generator).log_softmax(1).flatten()
    witness_B = (torch.rand(4, 5, generator=generator) * 4).softmax(1).flatten() / 4
    return scores_BN, group_B, log_prior_B, witness_B @ scores_BN[:, 1:] + torch.tensor([0.03, -0.2])


def exact(scores_BN, group_B, log_prior_B, thresholds_M):
    policy, groups = cp.Variable(len(scores_BN)), group_B.numpy()
    meets = policy @ scores_BN[:, 1:].numpy() / 4 >= thresholds_M.numpy()
    divergence = cp.sum(cp.rel_entr(policy, log_prior_B.exp().numpy()))
    simplex = [cp.sum(policy[groups == x]) == 1 for x in range(4)]
    gain = (scores_BN[:, 0].numpy() @ policy - BETA * divergence) / 4
    cp.Problem(cp.Maximize(gain), [meets, *simplex]).solve(
        solver=cp.CLARABEL, tol_gap_abs=1e-10, tol_gap_rel=1e-10, tol_feas=1e-10
    )
    # Where a solver stops depends on the processor, by 1e-5 in a probability. So it says which thresholds are active
    # and about how strongly; the closed form's multipliers, for which they hold with equality, have all digits.
    active = meets.dual_value > 1e-3

    def closed_form(duals):
        tilted = log_prior_B + (scores_BN[:, 0] + scores_BN[:, 1:][:, active] @ torch.as_tensor(duals)) / BETA
        return tilted.view(4, 5).softmax(1).flatten()

    def violation(duals):
        return (closed_form(duals) @ scores_BN[:, 1:][:, active] / 4 - thresholds_M[active]).numpy()

    scores_BN, log_prior_B, thresholds_M = scores_BN.double(), log_prior_B.double(), thresholds_M.double()
    best_M = np.zeros(len(active))
    if active.any():
        found = root(violation, meets.dual_value[active], tol=1e-12)
        assert found.success
        best_M[active] = found.x
    best_B = closed_form(best_M[active]).numpy()
    np.testing.assert_allclose(policy.value, best_B, atol=1e-3)
    return best_B, best_M


def train(combiner, seed, kept, steps):
    """A softmax policy for each prompt, by exact natural gradients on the combined score; CAID sees ``kept``."""
    scores_BN, group_B, log_prior_B, thresholds_M = problem(seed)
    combiner = dataclasses.replace(combiner, thresholds=dict(zip("bc", thresholds_M.tolist(), strict=True)))
    reference = batch(scores_BN, group_B, log_prior_B=log_prior_B)
    state = combiner.observe(reference.select(kept), begin(combiner, 3))
    log_ratio_B = torch.zeros(20)
    for _ in range(steps):
        policy_B = (log_prior_B + log_ratio_B).exp()
        means_GN = torch.stack([policy_B[group_B == x] @ scores_BN[group_B == x] for x in range(4)])
        state = combiner.observe(batch(means_GN, torch.arange(4)), state)
        rows = dataclasses.replace(reference, kl_penalty_B=BETA * log_ratio_B)
        advantage_B = score(combiner, rows, state).score * state["spread"]  # without the batch's scale
        log_policy_B = log_prior_B + log_ratio_B + 0.3 / BETA * advantage_B
        log_ratio_B = log_policy_B.view(4, 5).log_softmax(1).flatten() - log_prior_B
    return (log_prior_B + log_ratio_B).exp(), state["duals"][1:], exact(scores_BN, group_B, log_prior_B, thresholds_M)


@pytest.mark.parametrize("seed", range(4))
def test_one_shot_the_policy_converges_to_the_exact_optimum(seed):
    # Here the five responses are all that there are, so each prompt is a problem of its own.
    combiner = CAID(reference_batches=1, interval=None, pool_prompts=False)
    policy_B, duals_M, (best_B, best_M) = train(combiner, seed, torch.arange(20), 100)
    assert (best_M[0] > 0.05) == (seed < 3)
    np.testing.assert_allclose(duals_M, best_M, atol=1e-4)
    np.testing.assert_allclose(policy_B, best_B, atol=1e-4)


@pytest.mark.parametrize("dual", [Projected(lr=0.2), Optimistic(lr=0.2), PID(kp=0.2, ki=0.2)])
def test_iterated_it_corrects_what_too_few_responses_of_the_reference_say(dual):
    some = torch.arange(20)[torch.arange(20) % 5 < 3]
    combiner = CAID(reference_batches=1, pool_prompts=False, interval=3, window=1, dual=dual)
    _, first_M, (best_B, best_M) = train(combiner, 1, some, 0)
    assert np.abs(first_M.numpy() - best_M).max() > 0.1
    policy_B, duals_M, _ = train(combiner, 1, some, 900)
    np.testing.assert_allclose(duals_M, best_M, atol=2e-3)
    np.testing.assert_allclose(policy_B, best_B, atol=1e-3)


def test_the_worked_number():
    combiner = CAID({"b": 0.0}, reference_batches=2)
    rows = batch([[1.0, -1.0], [0.0, 1.0], [0.0, 0.0]], beta=0.5)
    state = combiner.observe(rows, begin(combiner))
    assert score(combiner, rows, state).score.tolist() == [0.0, 0.0, 0.0]  # the policy stands still
    assert state["duals"].tolist() == [0.0, 0.0]
    state = combiner.observe(rows, state)
    assert state["duals"].tolist() == pytest.approx([0.0, 0.5], abs=1e-6)
    combined = score(combiner, rows, state)
    signal_B = torch.tensor([0.5, 0.5, 0.0]) - 1 / 3
    torch.testing.assert_close(combined.score, signal_B / signal_B.square().mean().sqrt())
    torch.testing.assert_close(combined.mean_weights(), torch.tensor([2 / 3, 1 / 3]))
    assert combiner.report(state)["duals"].isnan().tolist() == [True, False]


def test_batches_of_the_reference_count_as_prompts_of_their_own():
    scores_BN, group_B = scored.draw(prompts=6)
    combiner = CAID({"b": 0.3}, reference_batches=1)
    whole = combiner.observe(batch(scores_BN, group_B), begin(combiner, 3))
    combiner = dataclasses.replace(combiner, reference_batches=2)
    state = begin(combiner, 3)
    for rows in (torch.arange(8), torch.arange(8, 24)):
        state = combiner.observe(batch(scores_BN[rows], group_B[rows] - group_B[rows][0]), state)
    assert whole["duals"][1] > 0.01
    torch.testing.assert_close(state["samples"], whole["samples"], rtol=0, atol=0)
    torch.testing.assert_close(state["duals"], whole["duals"], rtol=0, atol=0)


def test_without_thresholds_nothing_may_get_worse_than_under_the_reference():
    combiner = CAID(reference_batches=1)
    scores_BN, group_B = torch.tensor([[1.0, -1.0], [0.0, 1.0], [3.0, torch.nan]]), torch.tensor([0, 0, 1])
    weighted = torch.tensor([3.0, 1.0, 1.0]).log()  # the reference gives the first three times as often as the second
    state = combiner.observe(batch(scores_BN, group_B, log_prior_B=weighted), begin(combiner))
    assert float(state["thresholds"][1]) == pytest.approx(-0.5, abs=1e-6)
    assert state["thresholds"][0].isnan()
    # What is best for the primary objective lowers the other; the multiplier makes up for it exactly.
    assert float(state["duals"][1]) == pytest.approx(0.5, abs=1e-5)
    constant = combiner.observe(batch(torch.tensor([[1.0, 0.1], [0.0, 0.1]]).repeat(3, 1)), begin(combiner))
    assert constant["duals"].tolist() == [0.0, 0.0]  # and no warning


def test_penalties_are_taken_off_each_objective_and_are_no_part_of_the_values():
    combiner, penalty_B = CAID({"b": 0.5}, reference_batches=1), torch.tensor([0.0, 0.0, 0.4])
    rows = batch([[1.0, 0.0], [0.0, 1.0], [0.5, 0.75]], penalty_B=penalty_B)
    state = combiner.observe(rows, begin(combiner))
    dual = float(state["duals"][1])
    assert dual > 0.1
    signal_B = torch.tensor([1.0, dual, 0.5 + 0.75 * dual]) - (1 + dual) * penalty_B
    expected_B = (signal_B - signal_B.mean()) / (signal_B - signal_B.mean()).square().mean().sqrt()
    torch.testing.assert_close(score(combiner, rows, state).score, expected_B, rtol=1e-5, atol=1e-5)
    policy_B = (signal_B / BETA).softmax(0)  # the solution's own; a cut-off response counts less the penalty
    assert float(policy_B @ (rows.rewards.trained_BN[:, 1] - penalty_B)) == pytest.approx(0.5, abs=1e-5)
    assert state["values"].tolist() == pytest.approx([0.5, 1.75 / 3])


@pytest.mark.parametrize("dual", [0.5, 3.0, 100.0])
def test_a_cut_off_response_is_never_preferred_for_what_it_gains_by_length(dual):
    """A fact more, of 8 instead of 7, for a penalty of .5: less than the penalty, whatever the multiplier is."""
    combiner, penalty_B = CAID({"b": 0.5}, reference_batches=1), torch.tensor([0.5, 0.0])
    rows = batch([[1 / 9, (8 / 9) ** 0.5], [1 / 8, (7 / 8) ** 0.5]], penalty_B=penalty_B)
    state = begin(combiner) | {"duals": torch.tensor([0.0, dual])}
    cut_off, complete = score(combiner, rows, state).score.tolist()
    assert cut_off < complete


def test_responses_without_a_score_do_not_count():
    combiner, nan = CAID({"b": 0.2}, reference_batches=1), torch.nan
    scores_BN, group_B = torch.tensor([[1.0, -1.0], [0.0, 1.0], [2.0, 0.0], [0.5, 0.5]]), torch.tensor([0, 0, 1, 1])
    plain = combiner.observe(batch(scores_BN, group_B), begin(combiner))
    more_BN = torch.cat([scores_BN, torch.tensor([[nan, nan], [9.0, 9.0]])])
    rows = batch(more_BN, torch.tensor([0, 0, 1, 1, 0, 1]))
    left_out = dataclasses.replace(rows, mask_BT=rows.mask_BT & (torch.arange(6) < 5).unsqueeze(1))
    state = combiner.observe(left_out, begin(combiner))
    assert torch.equal(state["samples"], plain["samples"])
    assert plain["duals"][1] > 0.01
    assert torch.equal(state["duals"], plain["duals"])
    assert score(combiner, left_out, state).score[4:].tolist() == [0.0, 0.0]
    # An objective that is missing in a whole prompt is left out of it, in the dual as in the score.
    missing_BN = scores_BN.clone()
    missing_BN[2:, 1] = nan
    rows = batch(missing_BN, group_B)
    by_prompt = dataclasses.replace(combiner, pool_prompts=False)
    state = by_prompt.observe(rows, begin(by_prompt))
    dual = float(state["duals"][1])
    first_B = (torch.tensor([1.0 - dual, dual]) / BETA).softmax(0)
    assert float(first_B @ scores_BN[:2, 1]) == pytest.approx(0.2, abs=1e-5)
    assert torch.isfinite(score(combiner, rows, state).score).all()


def test_what_lacks_a_score_does_not_count_in_the_dual():
    combiner, generator = CAID({"b": 0.8}, reference_batches=1), torch.Generator().manual_seed(0)
    scores_BN, group_B = torch.rand(256, 2, generator=generator), torch.arange(256) // 4
    lacking_B = (torch.arange(256) % 4 == 1) & (group_B % 4 != 0)  # one score in each of three prompts out of four
    missing_BN = scores_BN.clone()
    missing_BN[lacking_B, 1] = torch.nan
    # Pooled, as if these responses were not there.
    state = combiner.observe(batch(missing_BN, group_B), begin(combiner))
    assert combiner.report(state)["scored"][1] == 1 - 0.75 / 4
    without = combiner.observe(batch(scores_BN[~lacking_B], group_B[~lacking_B]), begin(combiner))
    assert 0.1 < without["duals"][1] < 5
    torch.testing.assert_close(state["duals"], without["duals"], rtol=1e-6, atol=1e-6)
    # By prompt, as if the objective were missing in all of these prompts.
    combiner = dataclasses.replace(combiner, pool_prompts=False)
    state = combiner.observe(batch(missing_BN, group_B), begin(combiner))
    assert combiner.report(state)["scored"][1] == 0.25
    missing_BN[group_B % 4 != 0, 1] = torch.nan
    without = combiner.observe(batch(missing_BN, group_B), begin(combiner))
    assert 0.1 < without["duals"][1] < 10
    torch.testing.assert_close(state["duals"], without["duals"], rtol=1e-6, atol=1e-6)


def test_a_threshold_that_no_response_can_judge_is_named():
    combiner = CAID({"b": 0.5}, reference_batches=1)
    rows = batch([[0.0, torch.nan], [torch.nan, 1.0], [1.0, torch.nan], [torch.nan, 0.0]], torch.tensor([0, 0, 1, 1]))
    with pytest.warns(UserWarning, match=r"0\.5 for 'b' has no responses with all the scores that it takes"):
        state = combiner.observe(rows, begin(combiner))
    assert 0 < state["duals"][1] < torch.inf


def few(generator, prompts, responses, level):
    """Three kinds of response in proportions 5 : 4 : 1, scores with a level of each prompt's own, and noise."""
    kind = torch.multinomial(torch.tensor([5.0, 4.0, 1.0]), prompts * responses, True, generator=generator)
    group_B = torch.arange(prompts).repeat_interleave(responses)
    level_GN = level * torch.randn(prompts, 2, generator=generator)
    scores_BN = torch.tensor([[-0.5, 0.0], [0.8, 0.0], [0.3, 0.6]])[kind]
    scores_BN = scores_BN + 0.05 * torch.randn(len(scores_BN), 2, generator=generator)
    return scores_BN + (level_GN - level_GN.mean(0))[group_B], group_B


@pytest.mark.parametrize("level", [0.0, 1.0])
def test_a_few_responses_to_a_prompt_give_the_multiplier_of_many(level):
    """What ruined runs with 4 responses: within a prompt the reference looks as if it could not meet the threshold."""
    generator = torch.Generator().manual_seed(3)
    by_prompt = CAID({"b": 0.4}, reference_batches=1, pool_prompts=False)
    many = by_prompt.observe(batch(*few(generator, 16, 2000, level)), begin(by_prompt))
    exact = float(many["duals"][1])
    assert 0.5 < exact < 1.5
    batches = [batch(*few(generator, 64, 4, level)) for _ in range(4)]
    for rows in batches:
        with pytest.warns(UserWarning, match=r"cannot be met, .* Its multiplier starts at"):
            by_prompt.observe(rows, begin(by_prompt))
    pooled = dataclasses.replace(by_prompt, pool_prompts=True)
    found = [float(pooled.observe(rows, begin(pooled))["duals"][1]) for rows in batches]
    assert sum(found) / 4 == pytest.approx(exact, rel=0.2)
    assert max(found) < 1.5 * exact
    assert min(found) > exact / 1.5


def test_a_threshold_out_of_reach_is_named_once():
    rows = batch([[1.0, 0.0, 0.0], [0.0, 0.5, 0.0], [0.0, 0.0, 0.5]], beta=0.5)
    combiner = CAID({"b": 0.7, "c": -1.0}, reference_batches=1, interval=None)
    with pytest.warns(UserWarning, match=r"threshold 0\.7 for 'b' cannot be met, .* would give 0\.5; lower") as found:
        state = combiner.observe(rows, begin(combiner, 3))
    assert len(found) == 1
    assert state["duals"].tolist() == pytest.approx([0.0, 2.0, 0.0])  # the primary objective's spread, no more
    other = dataclasses.replace(rows, kl_coefficient=0.4)
    combiner.observe(other, state)  # solved anew, not told again: warnings are errors here
    with pytest.warns(UserWarning, match=r"for '[bc]' cannot be met, with the others"):
        CAID({"b": 0.3, "c": 0.3}, reference_batches=1).observe(rows, begin(combiner, 3))
    combiner = CAID({"b": 0.49}, reference_batches=1, dual=Projected(cap=2.0))
    with pytest.warns(UserWarning, match=r"takes a multiplier of .*, and its dual step's largest is 4; let"):
        assert float(combiner.observe(rows, begin(combiner, 3))["duals"][1]) == 4.0  # in spreads


def test_dual_steps_are_taken_in_spreads():
    """An objective in other units is held as well: its multiplier is in the inverse ones."""
    scores_BN, group_B = scored.draw(prompts=6, objectives=2)
    for scale in (1.0, 1000.0):
        combiner = CAID({"b": 0.5 * scale}, reference_batches=1)
        rows = batch(scores_BN * torch.tensor([1.0, scale]), group_B)
        state = begin(combiner)
        for _ in range(20):
            state = combiner.observe(rows, state)
        if scale == 1.0:
            first = state["duals"]
    assert first[1] > 0
    torch.testing.assert_close(state["duals"] * scale, first, rtol=1e-3, atol=1e-6)


def test_a_step_adds_to_the_solved_multiplier_what_vanishes_with_the_violation():
    """So the first one may follow the reference's violation: the multiplier it leaves behind is the solved one."""
    dual = LogPID(kp=1.5, ki=0.03, kd=0.0, margin=0.0)
    combiner = CAID({"b": 0.5}, reference_batches=1, window=1, dual=dual)
    solved = combiner.observe(batch([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0], [0.9, 0.3]]), begin(combiner))
    first = float(solved["duals"][1])
    assert first > 0.05
    below = combiner.observe(batch([[1.0, 0.0], [0.5, 0.5], [0.0, 0.7], [0.9, 0.4]]), solved)
    violation = (0.5 - 0.4) / float(below["spreads"][1])
    assert violation > 0.3
    assert float(below["duals"][1]) == pytest.approx(first * math.exp(1.53 * violation), rel=1e-5)
    met = combiner.observe(batch([[0.5, 0.5], [0.5, 0.5], [0.0, 1.0], [1.0, 0.0]]), below)
    assert float(met["duals"][1]) == pytest.approx(first * math.exp(0.03 * violation), rel=1e-5)


def test_iterated_a_threshold_that_stays_violated_is_named():
    combiner = CAID({"b": 0.5}, reference_batches=1, interval=2, window=2, dual=Projected(lr=5.0, cap=3.0), patience=2)
    state = combiner.observe(batch([[1.0, 0.0], [0.0, 1.0]]), begin(combiner))
    for _ in range(3):
        state = combiner.observe(batch([[1.0, 0.0], [1.0, 0.0]]), state)
    with pytest.warns(UserWarning, match=r"'b' is not met: .* been 3, its largest, for 2 dual steps; .* of 2 is 0\."):
        combiner.observe(batch([[1.0, 0.0], [1.0, 0.0]]), state)


def test_the_dual_follows_the_coefficient_of_the_run_until_it_is_stepped():
    scores_BN = [[1.0, -1.0], [0.0, 1.0], [0.0, 0.0]]
    for interval, follows in ((None, True), (100, False)):
        combiner = CAID({"b": 0.1}, reference_batches=1, interval=interval)
        state = combiner.observe(batch(scores_BN, beta=0.5), begin(combiner))
        later = combiner.observe(batch(scores_BN, beta=0.3), state)
        assert torch.equal(later["samples"], state["samples"])
        anew = combiner.observe(batch(scores_BN, beta=0.3), begin(combiner))
        assert not torch.equal(anew["duals"], state["duals"])
        assert torch.equal(later["duals"], anew["duals"] if follows else state["duals"])


@pytest.mark.parametrize("interval", [None, 2])
def test_a_checkpoint_goes_on_to_the_bit_and_takes_new_thresholds(tmp_path, interval):
    combiner = CAID({"b": 0.1}, reference_batches=3, interval=interval, window=3, dual=PID(kp=0.5, kd=0.5))
    generator = torch.Generator().manual_seed(0)
    batches = [batch(torch.randn(8, 3, generator=generator), torch.arange(8) // 4) for _ in range(9)]
    for stop in (2, 5):  # before and after the dual is solved
        state = begin(combiner, 3)
        for rows in batches[:stop]:
            state = combiner.observe(rows, state)
        assert all(value.dtype == torch.float32 for value in state.values())
        torch.save(state, tmp_path / "state.pt")
        resumed = combiner.resume(torch.load(tmp_path / "state.pt", weights_only=True), begin(combiner, 3))
        for rows in batches[stop:]:
            state, resumed = combiner.observe(rows, state), combiner.observe(rows, resumed)
        torch.testing.assert_close(resumed, state, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(score(combiner, batches[0], resumed).score, score(combiner, batches[0], state).score)
    other = dataclasses.replace(combiner, thresholds={"c": 1.0})
    changed = other.observe(batches[0], other.resume(state, begin(other, 3)))
    assert changed["duals"][1] == 0.0
    assert changed["duals"][2] > 0.0
    assert changed["dual_sum"].isnan().all()  # the steps begin where the new solution is
    assert torch.equal(changed["samples"], state["samples"])


def check(source, kl):
    check_compatible(CAID(), source, ClippedSurrogate(), kl, RewardPanel({"a": Objective(Length())}))


def test_it_needs_a_kl_charge_and_several_responses_to_a_prompt():
    several = Rollout(num_generations=4)
    check(several, RewardKL(0.1))
    for kl in (RewardKL(0.0), LossKL(0.1)):
        with pytest.raises(
            ValueError, match=r"CAID needs a KL penalty in the rewards: .* use kl RewardKL with init_kl_co"
        ):
            check(several, kl)
    with pytest.raises(ValueError, match="CAID needs groups, which Rollout does not provide"):
        check(Rollout(), RewardKL(0.1))
    assert Signal.KL_PENALTY not in PAMA().needs


@pytest.mark.parametrize("setting", ["reference_batches", "interval", "window", "patience"])
def test_refuses_settings_without_meaning(setting):
    with pytest.raises(ValueError, match=f"CAID needs {setting} of at least 1, got 0"):
        CAID(**{setting: 0})
    with pytest.raises(ValueError, match="CAID needs dual_window from 1 to window 8, got 9"):
        CAID(dual_window=9)
