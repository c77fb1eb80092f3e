"""MOPO's steps against the exact solution of the same finite problem."""

import dataclasses

import pytest
import torch

from moa_lightning.combiners import MOPO, Lagrangian, LogBarrier
from moa_lightning.functional import mopo_dual, mopo_ratio, robust_value
from moa_lightning.signals import Signals
from moa_lightning.types import Experience, Responses, RewardTable


def problem(seed=0, prompts=3, responses=5, objectives=3):
    generator = torch.Generator().manual_seed(seed)
    wins_BN = torch.rand(prompts * responses, objectives, generator=generator)
    return wins_BN, torch.arange(prompts).repeat_interleave(responses)


def batch(wins_BN, group_B, log_prior_B=None, names=("a", "b", "c")):
    count, objectives = wins_BN.shape
    names = names[:objectives]
    tokens_BL, mask_BT, texts = torch.ones(count, 2), torch.ones(count, 1, dtype=torch.bool), [""] * count
    return Experience(
        responses=Responses(tokens_BL, tokens_BL, mask_BT, ~mask_BT[:, 0], texts, texts, {}),
        rewards=RewardTable(names, (True,) * objectives, wins_BN, wins_BN),
        valid_BN=wins_BN.isfinite(),
        mask_BT=mask_BT,
        behaviour_logprobs_BT=torch.zeros(count, 1),
        reference_logprobs_BT=torch.zeros(count, 1),
        advantages_BTN=(wins_BN - 0.5).unsqueeze(1),
        returns_BTN=None,
        values_BTN=None,
        tokens_per_row=1.0,
        group_B=group_B,
        wins_BN=wins_BN,
        log_prior_B=log_prior_B,
    )


def signals(wins_BN, group_B, log_prior_B=None):
    count = len(wins_BN)
    mask_BT = torch.ones(count, 2, dtype=torch.bool)
    return Signals(mask_BT, wins_BN.isfinite(), wins_BN=wins_BN, group_B=group_B, log_prior_B=log_prior_B)


def run(combiner, wins_BN, group_B, steps, log_prior_B=None):
    names = ["a", "b", "c"][: wins_BN.shape[1]]
    state = combiner.init(names, torch.ones(len(names)))
    evidence = batch(wins_BN, group_B, log_prior_B, tuple(names))
    for _ in range(steps):
        state = combiner.observe(evidence, state)
    return state, combiner.combine(signals(wins_BN, group_B, log_prior_B), state)


@pytest.mark.parametrize("with_prior", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_converges_to_the_exact_multipliers_and_weights(seed, with_prior):
    wins_BN, group_B = problem(seed, prompts=1, responses=6)
    log_prior_B = torch.randn(6, generator=torch.Generator().manual_seed(seed)).log_softmax(0) if with_prior else None
    some_policy_B = (4 * torch.randn(6, generator=torch.Generator().manual_seed(100 + seed))).softmax(0)
    thresholds_M = some_policy_B @ wins_BN[:, 1:] - 0.005  # that policy shows that they can be met
    exact = mopo_dual(wins_BN[:, 0], wins_BN[:, 1:], thresholds_M, 0.1, log_prior_B)
    assert exact.feasible
    named = dict(zip("bc", thresholds_M.tolist(), strict=True))
    combiner = MOPO(thresholds=named, tau=0.1, dual=Lagrangian(lr=0.5))
    state, combined = run(combiner, wins_BN, group_B, 4000, log_prior_B)
    torch.testing.assert_close(state["duals"][1:], exact.duals, atol=2e-3, rtol=2e-3)
    prior_B = torch.full((6,), 1 / 6) if log_prior_B is None else log_prior_B.exp()
    torch.testing.assert_close(combined.score / 6, exact.ratio * prior_B, atol=1e-3, rtol=1e-3)


def test_weights_are_the_ratio_of_each_prompt():
    wins_BN, group_B = problem()
    state, combined = run(MOPO(thresholds={"b": 0.6, "c": 0.5}), wins_BN, group_B, 50)
    for prompt in range(3):
        rows = group_B == prompt
        ratio = mopo_ratio(wins_BN[rows, 0], wins_BN[rows, 1:], state["duals"][1:], 0.08)
        torch.testing.assert_close(combined.score[rows], ratio, rtol=1e-4, atol=1e-5)
    whole = dataclasses.replace(MOPO(thresholds={"b": 0.6, "c": 0.5}), normalize="batch")
    score_B = whole.combine(signals(wins_BN, group_B), state).score
    torch.testing.assert_close(score_B, mopo_ratio(wins_BN[:, 0], wins_BN[:, 1:], state["duals"][1:], 0.08))


def test_prompts_need_not_stand_together_nor_have_equally_many_responses():
    wins_BN, group_B = problem(prompts=2, responses=4)
    wins_BN, group_B = wins_BN[:7], group_B[:7]
    order = torch.tensor([5, 0, 3, 6, 1, 4, 2])
    combiner = MOPO(thresholds={"b": 0.6})
    state, combined = run(combiner, wins_BN, group_B, 30)
    shuffled, other = run(combiner, wins_BN[order], group_B[order], 30)
    torch.testing.assert_close(other.score, combined.score[order])
    torch.testing.assert_close(shuffled["duals"], state["duals"])
    for prompt in range(2):
        torch.testing.assert_close(combined.score[group_B == prompt].mean(), torch.tensor(1.0))


def test_a_missing_label_counts_in_nothing():
    wins_BN, group_B = problem(prompts=3)
    wins_BN[group_B == 1, 1] = torch.nan
    state, combined = run(MOPO(thresholds={"b": 0.6}), wins_BN, group_B, 1)
    present = (group_B != 1).nonzero().flatten()
    alone, _ = run(MOPO(thresholds={"b": 0.6}), wins_BN[present], group_B[present] // 2, 1)
    torch.testing.assert_close(state["values"][1], alone["values"][1])
    rows = group_B == 1
    without = mopo_ratio(wins_BN[rows, 0], wins_BN[rows, 2:], torch.zeros(1), 0.08)
    torch.testing.assert_close(combined.score[rows], without)


def test_the_robust_value_is_the_function_of_that_name():
    wins_BN, group_B = problem(prompts=1)
    state, _ = run(MOPO(thresholds={"b": 0.01}, radius=0.05), wins_BN, group_B, 1)
    ratio_B = mopo_ratio(wins_BN[:, 0], wins_BN[:, 1:], torch.zeros(2), 0.08)
    value, chi = robust_value(ratio_B * wins_BN[:, 1], 0.05)
    torch.testing.assert_close(state["values"][1], value)
    torch.testing.assert_close(state["chi"][1], chi)
    plain, _ = run(MOPO(thresholds={"b": 0.01}), wins_BN, group_B, 1)
    assert state["values"][1] < plain["values"][1]


def test_adaptive_thresholds_follow_the_reference_at_their_interval():
    wins_BN, group_B = problem()
    combiner = MOPO(beta=0.9, refresh_interval=3)
    state = combiner.init(["a", "b", "c"], torch.ones(3))
    priors = torch.randn(2, len(wins_BN), generator=torch.Generator().manual_seed(0))
    seen = []
    for step in range(4):
        state = combiner.observe(batch(wins_BN, group_B, priors[step // 3]), state)
        seen.append(state["thresholds"].clone())
    for prior_B, thresholds_N in zip(priors, (seen[0], seen[3]), strict=True):
        reference_B = prior_B.view(3, 5).softmax(1).flatten() / 3
        torch.testing.assert_close(thresholds_N[1:], 0.9 * (reference_B @ wins_BN)[1:])
    assert torch.isnan(seen[0][0])
    assert torch.equal(seen[0][1:], seen[2][1:])


def test_adaptive_thresholds_bind_where_the_objectives_conflict():
    """Thresholds below what the optimum has without constraints would leave every multiplier at 0, for ever."""
    wins_BN, group_B = problem(prompts=1, objectives=2)
    wins_BN[:, 1] = 1 - wins_BN[:, 0]
    state, _ = run(MOPO(beta=0.95, dual=Lagrangian(lr=0.5)), wins_BN, group_B, 2000)
    assert state["duals"][1] > 0.1
    torch.testing.assert_close(state["values"][1], 0.95 * wins_BN[:, 1].mean(), atol=1e-4, rtol=0)


def test_the_barrier_keeps_a_distance_that_its_strength_sets():
    wins_BN, group_B = problem(seed=3, prompts=1, responses=6, objectives=2)
    free = mopo_dual(wins_BN[:, 0], wins_BN[:, 1:], torch.zeros(1), 0.1)
    threshold = float(free.values[0] + 0.3 * (wins_BN[:, 1].max() - free.values[0]))
    slacks = []
    for sigma in (0.1, 0.01, 0.001):
        combiner = MOPO(thresholds={"b": threshold}, tau=0.1, dual=LogBarrier(sigma=sigma, rate=0.01, margin=1e-4))
        state, _ = run(combiner, wins_BN, group_B, 5000)
        slack = float(state["values"][1]) - threshold
        assert float(state["duals"][1]) == pytest.approx(sigma / slack, rel=0.05)  # where the barrier is stationary
        slacks.append(slack)
    assert slacks[0] > slacks[1] > slacks[2] > 0


@pytest.mark.parametrize("dual", [Lagrangian(lr=1.0, cap=5.0), LogBarrier(sigma=0.01, rate=0.5)])
def test_thresholds_out_of_reach_are_named_once(dual):
    wins_BN, group_B = problem(objectives=2)
    combiner = MOPO(thresholds={"b": 0.999}, dual=dual, patience=20)
    with pytest.warns(UserWarning, match="threshold 0.999 for 'b' cannot be met.*best value reached is 0.") as found:
        state, _ = run(combiner, wins_BN, group_B, 400)
    assert len(found) == 1
    assert torch.isfinite(state["duals"]).all()


def test_nothing_is_said_where_the_threshold_is_met(recwarn):
    wins_BN, group_B = problem(objectives=2)
    run(MOPO(thresholds={"b": 0.5}, patience=20), wins_BN, group_B, 400)
    assert not recwarn.list


def test_the_delay_holds_the_multipliers():
    wins_BN, group_B = problem()
    combiner = MOPO(thresholds={"b": 0.9}, dual_delay=5)
    assert float(run(combiner, wins_BN, group_B, 5)[0]["duals"][1]) == 0
    assert float(run(combiner, wins_BN, group_B, 6)[0]["duals"][1]) > 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MOPO(thresholds={"b": 1.0}), r"MOPO.thresholds.b must lie in \(0, 1\)"),
        (lambda: MOPO(thresholds={"b": -0.1}), r"must lie in \(0, 1\)"),
        (lambda: MOPO(tau=0.0), "tau > 0"),
        (
            lambda: MOPO(thresholds={"x": 0.5}).init(["a", "b"], torch.ones(2)),
            "'x', which is no trained objective",
        ),
        (lambda: MOPO(thresholds={"a": 0.5}).init(["a", "b"], torch.ones(2)), "names 'a', the primary objective"),
        (lambda: MOPO(primary="x").init(["a", "b"], torch.ones(2)), "MOPO.primary 'x' is no trained objective"),
        (lambda: Lagrangian(lr=0.0), "lr > 0"),
        (lambda: LogBarrier(rate=2.0), "rate in"),
    ],
)
def test_refuses_settings_without_meaning(make, message):
    with pytest.raises(ValueError, match=message):
        make()
