"""PPO-Lag: the exact solution of small convex problems, what its values are, and its KL strength."""

import cvxpy as cp
import numpy as np
import pytest
import torch

import moa_lightning.combiners.shared.constraints as module
from moa_lightning.combiners import PID, Exponential, Lagrangian, LogPID, Optimistic, Projected
from moa_lightning.signals import Signals
from moa_lightning.sources import GAE, GroupRelative
from tests.combiners.scored import experience


def collected(*rows):
    return experience(torch.tensor(rows), torch.zeros(len(rows)).long())


def begin(combiner, objectives=2):
    return combiner.init("abc"[:objectives], torch.ones(objectives))


def score(combiner, state, advantages_BTN):
    mask_BT = torch.ones(advantages_BTN.shape[:2], dtype=torch.bool)
    valid_BN = torch.ones(advantages_BTN.shape[::2], dtype=torch.bool)
    return combiner.combine(Signals(mask_BT, valid_BN, advantages_BTN=advantages_BTN), state)


def exact(rewards_BN, thresholds_M, budget):
    """``max E[r_1], E[r_j] >= b_j, KL(pi | uniform) <= budget``: policy, multipliers, and that of the budget."""
    count, policy = len(rewards_BN), cp.Variable(len(rewards_BN))
    meets = policy @ rewards_BN[:, 1:] >= thresholds_M
    near = cp.sum(cp.rel_entr(policy, np.full(count, 1 / count))) <= budget
    problem = cp.Problem(cp.Maximize(rewards_BN[:, 0] @ policy), [cp.sum(policy) == 1, meets, near])
    problem.solve(solver=cp.CLARABEL, tol_gap_abs=1e-10, tol_gap_rel=1e-10, tol_feas=1e-10)
    return policy.value, meets.dual_value, float(near.dual_value)


@pytest.mark.parametrize(
    "dual",
    [Exponential(lr=1.0, floor=1e-4), Projected(), Optimistic(), PID(), LogPID(ki=0.5, margin=0.0, floor=1e-4)],
    ids=lambda dual: type(dual).__name__,
)
@pytest.mark.parametrize("active", [1, 2])
def test_converges_to_the_exact_policy_and_multipliers(dual, active):
    rewards_BN = torch.rand(6, 3, generator=torch.Generator().manual_seed(active))
    at_budget, _, _ = exact(rewards_BN.numpy(), np.zeros(2), 0.3)
    thresholds_M = at_budget @ rewards_BN[:, 1:].numpy() + np.array([0.08, 0.02 if active == 2 else -0.4])
    policy_B, duals_M, strength = exact(rewards_BN.numpy(), thresholds_M, 0.3)
    assert (duals_M > 0.05).sum() == active
    assert strength > 0.05
    # At the solution r_1 + lambda r - strength log pi/ref is constant; the weights divide this by 1 + sum lambda.
    tau = strength / (1 + duals_M.sum())
    combiner = Lagrangian(dict(zip("bc", thresholds_M.tolist(), strict=True)), dual=dual, window=1)
    state, log_ratio_B = begin(combiner, 3), torch.zeros(6)
    for _ in range(3000):
        now_B = log_ratio_B.softmax(0)
        state = combiner.observe(collected((now_B @ rewards_BN).tolist()), state)
        advantages_BN = rewards_BN - tau * log_ratio_B.unsqueeze(1)
        advantages_BN = advantages_BN - now_B @ advantages_BN
        step_B = score(combiner, state, advantages_BN.unsqueeze(1)).score[:, 0]
        log_ratio_B = (log_ratio_B + 0.2 / tau * step_B).log_softmax(0) + np.log(6)
    np.testing.assert_allclose(log_ratio_B.softmax(0), policy_B, atol=1e-3)
    np.testing.assert_allclose(state["duals"][1:], duals_M, atol=5e-3)


@pytest.mark.parametrize("estimator", [GroupRelative(standardize=False), GAE(standardize=False)])
def test_the_kl_charge_is_as_strong_whatever_the_multipliers_are(estimator):
    generator = torch.Generator().manual_seed(0)
    rewards_BTN, kl_BT1 = torch.randn(4, 3, 2, generator=generator), torch.randn(4, 3, 1, generator=generator)
    mask_BT, valid_BN = torch.ones(4, 3, dtype=torch.bool), torch.ones(4, 2, dtype=torch.bool)

    def trained_on(rewards_BTN, dual):
        values_BTN = torch.zeros(4, 3, 2)
        advantages_BTN, _ = estimator.estimate(rewards_BTN, values_BTN, mask_BT, valid_BN, 2)
        combiner = Lagrangian({"b": 0.0})
        return score(combiner, begin(combiner) | {"duals": torch.tensor([0.0, dual])}, advantages_BTN).score

    charges = [trained_on(rewards_BTN - 0.5 * kl_BT1, d) - trained_on(rewards_BTN, d) for d in (0.0, 0.7, 50.0)]
    assert charges[0].abs().max() > 0.1
    for charge_BT in charges[1:]:
        torch.testing.assert_close(charge_BT, charges[0], atol=1e-6, rtol=1e-5)


def test_the_weights_are_the_papers():
    combiner = Lagrangian({"b": 0.0, "c": 0.0}, primary="c")
    with pytest.raises(ValueError, match="names 'c', the primary objective"):
        begin(combiner, 3)
    combiner = Lagrangian({"b": 0.0})
    combined = score(combiner, begin(combiner, 3) | {"duals": torch.tensor([0.0, 3.0, 0.0])}, torch.eye(3)[None])
    assert combined.score.tolist() == [[0.25, 0.75, 0.0]]
    assert combined.mean_weights().tolist() == [0.25, 0.75, 0.0]


def test_the_worked_number():
    combiner = Lagrangian({"b": 1.5}, window=1, dual=Exponential())
    state = combiner.observe(collected([0.0, -2.0], [0.0, 1.0]), begin(combiner))
    assert float(state["duals"][1]) == pytest.approx(1.221403, abs=1e-6)  # violation 2


def test_values_are_means_of_the_windows_responses_in_the_objectives_units():
    combiner = Lagrangian({"b": 0.0}, window=2, dual_window=2, dual=Projected(lr=0.1))
    state, seen, nan = begin(combiner), [], torch.nan
    for batch in (
        collected([100.0, -1.0]),
        collected([40.0, 2.0], [40.0, nan], [40.0, 5.0]),  # the one that b could not score counts for a alone
        collected([nan, nan]),
        collected([nan, nan]),
        collected([0.0, -3.0]),
    ):
        state = combiner.observe(batch, state)
        seen.append([*state["values"].tolist(), float(state["duals"][1])])
    assert seen[0] == pytest.approx([100.0, -1.0, 0.1])
    assert seen[1] == pytest.approx([55.0, 2.0, 0.0])
    assert seen[2] == pytest.approx([40.0, 3.5, 0.0])
    assert np.isnan(seen[3][:2]).all()  # nothing is known, so nothing moves
    assert seen[4] == pytest.approx([0.0, -3.0, 0.3])
    report = combiner.report(state)
    assert report["duals"].isnan().tolist() == [True, False]
    assert report["thresholds"].tolist()[1] == 0.0


def test_two_processes_are_one(monkeypatch):
    combiner, whole = Lagrangian({"b": 1.0}), collected([1.0, 0.5], [2.0, -1.0], [0.0, 3.0])
    kept = begin(combiner)
    together = combiner.observe(whole, kept)
    # The other process's part of each sum; the squares are about the mean of both.
    deviations_BN = whole.rewards.trained_BN - whole.rewards.trained_BN.mean(0)
    count_N, sum_N = torch.full((2,), 2.0), whole.rewards.trained_BN[1:].sum(0)
    rest = [torch.stack([sum_N, count_N]), count_N, sum_N, deviations_BN[1:].square().sum(0)]
    monkeypatch.setattr(module, "all_sum", lambda sums: sums + rest.pop(0))
    divided = combiner.observe(whole.select(torch.tensor([0])), kept)
    assert not rest
    torch.testing.assert_close(divided, together, rtol=1e-6, atol=1e-6, equal_nan=True)


def test_spreads_are_between_responses_whatever_the_mean():
    combiner, state = Lagrangian({"b": 1.0}), begin(Lagrangian({"b": 1.0}))
    values_B = 1e4 + torch.tensor([-3.0, 3.0, -3.0, 3.0])
    state = combiner.observe(collected(*([0.5, float(value)] for value in values_B)), state)
    assert state["spreads"].tolist() == pytest.approx([1e-6, 3.0], rel=1e-3)  # the floor of one that is constant
    state = combiner.observe(collected(*([0.5, float(value)] for value in 5 * values_B)), state)
    assert float(state["spreads"][1]) == pytest.approx(((9 + 225) / 2) ** 0.5, rel=1e-3)
    unknown = combiner.observe(collected([0.5, torch.nan], [1.5, torch.nan]), state)
    assert float(unknown["spreads"][1]) == float(state["spreads"][1])


def test_an_objective_that_is_scored_late_has_its_own_spread_from_then_on():
    """The first spread of 1 counts in none: .01, first scored in batch 4, was .55 at batch 10."""
    combiner, nan = Lagrangian({"b": 1.0}), torch.nan
    state = begin(combiner)
    generator, square = torch.Generator().manual_seed(0), torch.ones(())
    for batch in range(1, 61):
        first_B = torch.randn(4, generator=generator)
        second = [nan] * 4 if batch < 4 else [-0.01, 0.01, -0.01, 0.01]
        rows = [[float(a), b] for a, b in zip(first_B, second, strict=True)]
        state = combiner.observe(collected(*rows), state)
        # An objective that is scored from the first batch on: the mean over all batches, exponential after 50.
        variance = (first_B - first_B.sum() / 4).square().sum() / 4
        square = square + 1 / torch.tensor(float(min(batch, 50))) * (variance - square)
        assert torch.equal(state["spreads"][0], square.sqrt())
        square = square.sqrt().square()  # as kept
        assert batch < 4 or float(state["spreads"][1]) == pytest.approx(0.01, rel=1e-2)
    assert state["spread_seen"].tolist() == [60.0, 57.0]
    old = {name: value for name, value in state.items() if name != "spread_seen"}
    assert combiner.resume(old, begin(combiner))["spread_seen"].tolist() == [0.0, 0.0]


def test_the_multiplier_of_an_objective_does_not_depend_on_its_unit():
    generator, seen = torch.Generator().manual_seed(0), []
    batches = torch.randn(12, 8, 2, generator=generator)
    for scale, shift in ((1.0, 0.0), (100.0, 7.0)):
        combiner = Lagrangian({"b": 0.3 * scale + shift})
        state = begin(combiner)
        for batch_BN in batches:
            rows = (batch_BN * torch.tensor([1.0, scale]) + torch.tensor([0.0, shift])).tolist()
            state = combiner.observe(collected(*rows), state)
        seen.append(float(state["duals"][1]))
    assert seen[0] != 1.0
    assert seen[1] == pytest.approx(seen[0], rel=1e-3)


def test_the_dual_step_follows_the_last_batches_and_values_are_the_windows():
    combiner = Lagrangian({"b": 0.0}, window=3, dual_window=1, dual=Projected(lr=0.1))
    state = begin(combiner)
    for value in (-1.0, -1.0, 2.0):
        state = combiner.observe(collected([0.0, value]), state)
    assert float(state["values"][1]) == 0.0
    assert float(state["duals"][1]) == 0.0  # .2, and down by the last batch alone


def test_without_thresholds_nothing_may_get_worse_than_at_the_start():
    combiner = Lagrangian(window=2, dual_window=2, dual=Exponential())
    state = begin(combiner)
    for value in (1.0, 3.0):
        state = combiner.observe(collected([0.0, value]), state)
        assert float(state["duals"][1]) == 1.0
    state = combiner.observe(collected([9.0, -1.0]), state)
    assert float(state["thresholds"][1]) == 2.0
    assert state["thresholds"][0].isnan()
    assert float(state["duals"][1]) == pytest.approx(np.exp(0.1), abs=1e-6)  # the window's mean has fallen to 1


def test_the_delay_holds_the_multipliers():
    combiner, batch = Lagrangian({"b": 1.0}, dual_delay=3, dual=Exponential()), collected([0.0, 0.0])
    state = begin(combiner)
    moved = [float((state := combiner.observe(batch, state))["duals"][1]) > 1 for _ in range(4)]
    assert moved == [False, False, False, True]


def test_a_threshold_that_stays_violated_at_the_cap_is_named_once():
    combiner, batch = (
        Lagrangian({"b": 2.0, "c": -1.0}, patience=10, window=3, dual=Exponential()),
        collected([0.0, 0.5, 0.0]),
    )

    def observe(state, steps):
        for _ in range(steps):
            state = combiner.observe(batch, state)
        return state

    state = observe(begin(combiner, 3), 10)
    assert state["duals"].tolist()[:2] == [0.0, 5.0]
    with pytest.warns(
        UserWarning, match=r"2 for 'b' is not met: .* been 5, its largest, for 10 .* of 3 is 0\.5\. L"
    ) as found:
        state = observe(state, 10)
    assert len(found) == 1
    observe(state, 30)  # not again: warnings are errors here


def test_a_checkpoint_goes_on_to_the_bit_and_takes_new_settings(tmp_path):
    combiner, generator = Lagrangian({"b": 0.5}, window=3), torch.Generator().manual_seed(0)
    batches = [experience(torch.randn(4, 3, generator=generator), torch.arange(4)) for _ in range(9)]
    state = begin(combiner, 3)
    for batch in batches[:5]:
        state = combiner.observe(batch, state)
    assert all(v.dtype == torch.float32 for v in state.values())
    torch.save(state, tmp_path / "state.pt")
    resumed = combiner.resume(torch.load(tmp_path / "state.pt", weights_only=True), begin(combiner, 3))
    for batch in batches[5:]:
        state, resumed = combiner.observe(batch, state), combiner.observe(batch, resumed)
    torch.testing.assert_close(resumed, state, rtol=0, atol=0, equal_nan=True)
    other = Lagrangian(
        {"c": 0.25}, window=2, dual=Exponential()
    )  # another threshold, another dual step, another window
    changed = other.resume(state, begin(other, 3))
    assert changed["duals"].tolist() == [0.0, 0.0, 1.0]
    assert changed["thresholds"].nan_to_num(9).tolist() == [9.0, 9.0, 0.25]
    assert changed["window"].shape == (2, 2, 3)
    assert set(changed) == set(begin(other, 3))
    other.observe(batches[0], changed)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: begin(Lagrangian({"x": 0.5})), "Lagrangian.thresholds names 'x', which is no trained objective"),
        (lambda: begin(Lagrangian(primary="x")), "Lagrangian.primary 'x' is no trained objective; they are a, b"),
        (lambda: begin(Lagrangian({"b": float("nan")})), "Lagrangian.thresholds.b must be a finite number"),
        (lambda: Lagrangian(window=0), "Lagrangian needs window of at least 1, got 0"),
        (lambda: Lagrangian(patience=0), "Lagrangian needs patience of at least 1, got 0"),
        (lambda: Lagrangian(dual_delay=-1), "Lagrangian needs dual_delay of at least 0, got -1"),
        (lambda: Lagrangian(dual_window=9), "Lagrangian needs dual_window from 1 to window 8, got 9"),
    ],
)
def test_refuses_settings_without_meaning(make, message):
    with pytest.raises(ValueError, match=message):
        make()
