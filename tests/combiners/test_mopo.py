"""MOPO's steps against the exact solution of the same finite problem."""

import dataclasses

import pytest
import torch

from moa_lightning.combiners import MOPO, LogBarrier, LogPID, Projected
from moa_lightning.functional import one_shot_dual, robust_value
from moa_lightning.signals import Signals
from moa_lightning.types import Experience, Responses, RewardTable
from tests.functional.closed_forms import mopo_ratio


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
    exact = one_shot_dual(wins_BN[:, 0], wins_BN[:, 1:], thresholds_M, 0.1, log_prior_B=log_prior_B)
    assert exact.feasible
    named = dict(zip("bc", thresholds_M.tolist(), strict=True))
    combiner = MOPO(thresholds=named, tau=0.1, dual=Projected(lr=0.5))
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
    for prompt in range(2):  # the constraint is an expectation over prompts, so each counts the same
        torch.testing.assert_close(combined.score[group_B == prompt].sum(), torch.tensor(7 / 2))


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


def test_a_response_that_nobody_judged_is_neither_for_nor_against():
    wins_BN = torch.full((3, 2), 0.5)
    wins_BN[2, 1] = torch.nan
    combiner = MOPO(thresholds={"b": 0.5})
    state = combiner.init(["a", "b"], torch.ones(2)) | {"duals": torch.tensor([0.0, 5.0])}
    torch.testing.assert_close(combiner.combine(signals(wins_BN, torch.zeros(3).long()), state).score, torch.ones(3))
    wins_BN[2] = torch.nan  # not judged by any objective: nothing is known of it, and nothing learnt from it
    score_B = combiner.combine(signals(wins_BN, torch.zeros(3).long()), state).score
    torch.testing.assert_close(score_B, torch.tensor([1.5, 1.5, 0.0]))
    observed = combiner.observe(batch(wins_BN, torch.zeros(3).long()), state)
    assert observed["values"].isnan().all()  # what the policy would have there depends on the missing label
    assert observed["labelled"].tolist() == [0.0, 0.0]


def test_only_prompts_with_all_labels_are_compared_with_a_threshold():
    wins_BN, group_B = problem(prompts=4, responses=3)
    wins_BN[4, 1] = torch.nan  # one response's label for b
    wins_BN[6:9, 2] = torch.nan  # all labels for c of a prompt
    state, _ = run(MOPO(thresholds={"b": 0.6, "c": 0.5}), wins_BN, group_B, 1)
    whole, _ = run(MOPO(thresholds={"b": 0.6, "c": 0.5}), *problem(prompts=4, responses=3), 1)
    torch.testing.assert_close(state["labelled"], torch.tensor([1.0, 0.75, 0.75]))
    torch.testing.assert_close(whole["labelled"], torch.ones(3))
    for column, lacking in ((1, 1), (2, 2)):
        rows = group_B != lacking
        alone, _ = run(MOPO(thresholds={"b": 0.6, "c": 0.5}), wins_BN[rows], group_B[rows], 1)
        torch.testing.assert_close(state["values"][column], alone["values"][column])
        torch.testing.assert_close(state["mean_attainable"][column], alone["mean_attainable"][column])
    torch.testing.assert_close(state["values"][0], whole["values"][0])


def test_a_threshold_without_any_complete_prompt_is_named():
    wins_BN, group_B = problem(prompts=2, responses=3)
    wins_BN[::3, 2] = torch.nan  # the label for c is never there for all responses
    with pytest.warns(UserWarning, match="0.5 for 'c' has not moved its multiplier: in 4 batches no prompt") as found:
        state, _ = run(MOPO(thresholds={"b": 0.5, "c": 0.5}, patience=4), wins_BN, group_B, 10)
    assert len(found) == 1
    assert float(state["duals"][2]) == 0


def shown(wins_BN, group_B, log_policy_B):
    """The batch as preference rows give it."""
    return dataclasses.replace(batch(wins_BN, group_B), log_policy_B=log_policy_B)


def test_the_policys_own_values_move_the_multipliers():
    wins_BN, group_B = problem()
    log_policy_B = torch.randn(len(wins_BN), generator=torch.Generator().manual_seed(7))
    policy_B = log_policy_B.view(3, 5).softmax(1).flatten() / 3
    own, rho = (MOPO(thresholds={"b": 0.6}, dual=Projected(lr=1.0), dual_values=v) for v in ("policy", "optimum"))
    for combiner, values in ((own, "values"), (rho, "none")):
        state = combiner.observe(shown(wins_BN, group_B, log_policy_B), combiner.init(list("abc"), torch.ones(3)))
        optimum, _ = run(rho, wins_BN, group_B, 1)
        torch.testing.assert_close(state["believed"], optimum["values"])
        expected_N = policy_B @ wins_BN if values == "values" else optimum["values"]
        torch.testing.assert_close(state["values"], expected_N)
        torch.testing.assert_close(state["duals"][1], (0.6 - expected_N[1]).clamp(min=0.0))
    batchwide = dataclasses.replace(own, normalize="batch")
    state = batchwide.observe(shown(wins_BN, group_B, log_policy_B), batchwide.init(list("abc"), torch.ones(3)))
    torch.testing.assert_close(state["values"], policy_B @ wins_BN)  # each prompt counts the same


def test_held_out_values_are_reported_where_they_are_win_probabilities():
    wins_BN, group_B = problem(objectives=2)
    combiner = MOPO(thresholds={"b": 0.6})
    online, _ = run(combiner, wins_BN, group_B, 1)
    offline = combiner.observe(shown(wins_BN, group_B, torch.zeros(15)), combiner.init(["a", "b"], torch.ones(2)))
    held_out_N = torch.tensor([0.55, 0.58])
    assert (
        combiner.report(combiner.observe_evaluation(held_out_N, online))["held_out"].isnan().all()
    )  # the rewards' own units
    assert torch.equal(combiner.report(combiner.observe_evaluation(held_out_N, offline))["held_out"], held_out_N)


@pytest.mark.parametrize("radius", [0.0, 0.01])
def test_an_evaluation_corrects_the_believed_values(radius):
    wins_BN, group_B = problem(objectives=2)
    combiner = MOPO(thresholds={"b": 0.6}, dual=Projected(lr=1.0), dual_values="held_out", radius=radius)
    rows = shown(wins_BN, group_B, torch.zeros(15))
    optimum = dataclasses.replace(combiner, dual_values="optimum")
    first, paper = (c.observe(rows, c.init(["a", "b"], torch.ones(2))) for c in (combiner, optimum))
    assert first["values"].isnan().all()  # nobody has looked yet: the multipliers move as in the paper
    torch.testing.assert_close(first["duals"], paper["duals"])
    second = combiner.observe(rows, first)
    plain = [
        dataclasses.replace(optimum, radius=0.0).observe(rows, s)["values"]
        for s in (paper | {"duals": first["duals"] * 0}, first)
    ]
    held_out_N = torch.tensor([0.55, 0.48])
    third = combiner.observe(rows, combiner.observe_evaluation(held_out_N, second))
    torch.testing.assert_close(third["gap"], held_out_N - (plain[0] + plain[1]) / 2)
    slack = float(third["believed"][1] + third["gap"][1]) - 0.6
    assert float(third["duals"][1]) == pytest.approx(max(float(second["duals"][1]) - slack, 0.0), abs=1e-6)
    taken_off = float(
        third["believed"][1] - dataclasses.replace(optimum, radius=0.0).observe(rows, second)["values"][1]
    )
    assert (taken_off < 0) == (radius > 0)
    assert float(third["values"][1]) == pytest.approx(0.48 + taken_off, abs=1e-6)
    assert float(combiner.observe_evaluation(held_out_N, third)["believed_seen"][1]) == 0


def votes(prompts, responses, seed=0):
    """A label by one vote for each pair of responses, and one that is a probability."""
    generator = torch.Generator().manual_seed(seed)
    won = torch.rand(prompts, responses, responses, generator=generator).round().triu(1)
    won = won + (1 - won.mT).tril(-1)
    wins_B = won.sum(2).flatten() / (responses - 1)
    group_B = torch.arange(prompts).repeat_interleave(responses)
    return torch.stack([torch.rand(len(wins_B), generator=generator), wins_B], 1), group_B


@pytest.mark.parametrize(("responses", "said"), [(2, True), (4, True), (8, False)])
def test_votes_among_few_responses_are_named_once(responses, said, recwarn):
    wins_BN, group_B = votes(6, responses)
    combiner = MOPO(thresholds={"b": 0.5})
    state = combiner.init(["a", "b"], torch.ones(2))
    for _ in range(2):
        state = combiner.observe(shown(wins_BN, group_B, torch.zeros(len(wins_BN))), state)
    found = [str(w.message) for w in recwarn]
    assert len(found) == said
    assert all(f"labels of 'b' are single votes among {responses} responses" in message for message in found)
    run(combiner, wins_BN, group_B, 1)  # on rollouts no label is a vote of the data
    assert len(recwarn) == said


def test_a_response_that_is_not_trained_on_has_no_share():
    wins_BN, group_B = problem(prompts=2)
    mask_BT = torch.ones(10, 2, dtype=torch.bool)
    mask_BT[[0, 7]] = False
    combiner = MOPO(thresholds={"b": 0.6})
    kept = mask_BT[:, 0]
    alone, expected = run(combiner, wins_BN[kept], group_B[kept], 20)
    evidence = dataclasses.replace(batch(wins_BN, group_B), mask_BT=mask_BT)
    state = combiner.init(["a", "b", "c"], torch.ones(3))
    for _ in range(20):
        state = combiner.observe(evidence, state)
    torch.testing.assert_close(state["duals"], alone["duals"])
    score_B = combiner.combine(dataclasses.replace(signals(wins_BN, group_B), mask_BT=mask_BT), state).score
    torch.testing.assert_close(score_B[kept], expected.score * 10 / 8)
    assert (score_B[~kept] == 0).all()


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
    for prior_B, thresholds_N in zip(priors, (seen[2], seen[3]), strict=True):
        reference_B = prior_B.view(3, 5).softmax(1).flatten() / 3
        torch.testing.assert_close(thresholds_N[1:], 0.9 * (reference_B @ wins_BN)[1:])
    assert torch.isnan(seen[0][0])
    assert torch.equal(seen[0][1:], seen[2][1:])


def test_adaptive_thresholds_average_what_batches_know():
    wins_BN, group_B = problem(objectives=2)
    combiner = MOPO(beta=0.9, refresh_interval=4)
    state = combiner.init(["a", "b"], torch.ones(2))
    values = (0.4, None, 0.6, 0.5)
    for value in values:  # an objective that a whole batch has no label of keeps its threshold
        wins_BN[:, 1] = torch.nan if value is None else value
        state = combiner.observe(batch(wins_BN, group_B, names=("a", "b")), state)
    assert float(state["thresholds"][1]) == pytest.approx(0.9 * 0.5)


def test_adaptive_thresholds_bind_where_the_objectives_conflict():
    """Thresholds below what the optimum has without constraints would leave every multiplier at 0, for ever."""
    wins_BN, group_B = problem(prompts=1, objectives=2)
    wins_BN[:, 1] = 1 - wins_BN[:, 0]
    state, _ = run(MOPO(beta=0.95, dual=Projected(lr=0.5)), wins_BN, group_B, 2000)
    assert state["duals"][1] > 0.1
    torch.testing.assert_close(state["values"][1], 0.95 * wins_BN[:, 1].mean(), atol=1e-4, rtol=0)


def test_the_barrier_keeps_a_distance_that_its_strength_sets():
    wins_BN, group_B = problem(seed=3, prompts=1, responses=6, objectives=2)
    free = one_shot_dual(wins_BN[:, 0], wins_BN[:, 1:], torch.zeros(1), 0.1)
    threshold = float(free.values[0] + 0.3 * (wins_BN[:, 1].max() - free.values[0]))
    slacks = []
    for sigma in (0.1, 0.01, 0.001):
        combiner = MOPO(thresholds={"b": threshold}, tau=0.1, dual=LogBarrier(sigma=sigma, rate=0.01, margin=1e-4))
        state, _ = run(combiner, wins_BN, group_B, 5000)
        slack = float(state["values"][1]) - threshold
        assert float(state["duals"][1]) == pytest.approx(sigma / slack, rel=0.05)  # where the barrier is stationary
        slacks.append(slack)
    assert slacks[0] > slacks[1] > slacks[2] > 0


def noisy(seed, q):
    """Batches of 8 prompts with 2 responses whose labels of b scatter around q; a is the other way round."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        wins_B = (q + 0.15 * torch.randn(16, generator=generator)).clamp(0, 1)
        yield batch(torch.stack([1 - wins_B, wins_B], 1), torch.arange(8).repeat_interleave(2), names=("a", "b"))


@pytest.mark.parametrize("dual", [Projected(), LogBarrier()])
def test_thresholds_out_of_reach_are_named_once(dual):
    combiner = MOPO(thresholds={"b": 0.75}, dual=dual, patience=50)
    state, batches = combiner.init(["a", "b"], torch.ones(2)), noisy(0, 0.5)

    def observe(state, steps):
        for _ in range(steps):
            state = combiner.observe(next(batches), state)
        return state

    # The better of two normal variables lies .56 deviations above the mean: .585.
    with pytest.warns(
        UserWarning, match=r"0.75 for 'b' cannot be met: always choosing .* 0\.5[89].* is 0\.[45]"
    ) as found:
        state = observe(state, 50)
    assert len(found) == 1
    observe(state, 300)  # not again: warnings are errors here


def test_thresholds_that_exclude_each_other_are_named():
    wins_BN = torch.tensor([[0.5, 0.9, 0.1], [0.5, 0.1, 0.9]])
    combiner = MOPO(thresholds={"b": 0.7, "c": 0.7}, dual=Projected(lr=1.0, cap=5.0), patience=20)
    with pytest.warns(UserWarning, match="multiplier has been at its largest for 20 batches") as found:
        state, _ = run(combiner, wins_BN, torch.zeros(2).long(), 400)
    assert sorted("'b'" in str(w.message) for w in found) == [False, True]
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
        (lambda: Projected(lr=0.0), "lr > 0"),
        (lambda: LogBarrier(rate=2.0), "rate in"),
    ],
)
def test_refuses_settings_without_meaning(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_on_rollouts_multipliers_follow_the_policys_own_mean_where_rivals_are_fixed():
    """The optimum chooses among a prompt's responses and so looks better than the policy that gave them is."""
    wins_BN, group_B = problem()
    nothing_B, moving_B3 = torch.zeros(len(wins_BN)), torch.tensor([False, False, True]).expand(len(wins_BN), -1)
    rows = dataclasses.replace(batch(wins_BN, group_B), log_policy_B=nothing_B, moving_BN=moving_B3)
    mean_N = wins_BN.mean(0)
    combiner = MOPO(thresholds={"b": float(mean_N[1]) + 0.01, "c": 0.2}, tau=0.05, dual=Projected(lr=1.0))
    state = combiner.observe(rows, combiner.init(["a", "b", "c"], torch.ones(3)))
    believed_N = combiner.report(state)["believed"]
    assert (believed_N[:2] > mean_N[:2] + 0.02).any()
    torch.testing.assert_close(state["values"][:2], mean_N[:2])
    assert state["values"][2] == believed_N[2]  # against the policy's own others the mean is .5 whatever they are worth
    assert float(state["duals"][1]) == pytest.approx(0.01, abs=1e-5)
    held_out_N = combiner.observe_evaluation(torch.tensor([0.6, 0.7, 0.8]), state)["held_out"]
    assert held_out_N[:2].tolist() == pytest.approx([0.6, 0.7])
    assert held_out_N[2].isnan()
    paper = dataclasses.replace(combiner, dual_values="optimum")
    state = paper.observe(rows, paper.init(["a", "b", "c"], torch.ones(3)))
    assert torch.equal(state["values"], believed_N)


def test_a_dual_step_in_spreads_takes_those_of_the_win_probabilities():
    """Threshold .5 and margin .08 spreads: the multiplier holds still at .508 if responses differ by .1, not at .58."""
    group_B = torch.zeros(4).long()
    moving = {}
    for mean in (0.508, 0.58):
        second_B = mean + torch.tensor([-0.1, 0.1, -0.1, 0.1])
        wins_BN = torch.stack([torch.full((4,), 0.5), second_B], 1)
        own = {"log_policy_B": torch.zeros(4), "moving_BN": torch.zeros(4, 2, dtype=torch.bool)}
        rows = dataclasses.replace(batch(wins_BN, group_B), **own)
        combiner = MOPO(thresholds={"b": 0.5}, dual=LogPID(margin=0.08))
        state = combiner.init(["a", "b"], torch.ones(2))
        for _ in range(10):
            state = combiner.observe(rows, state)
        assert float(state["spreads"][1]) == pytest.approx(0.1, rel=1e-3)
        moving[mean] = float(state["duals"][1])
    assert moving[0.508] == pytest.approx(1.0, abs=1e-3)
    assert moving[0.58] < 0.5


def test_own_values_on_rollouts_count_responses_that_are_left_out_of_the_update():
    """As evaluations do: else the multiplier follows a value that cut-off responses have no part in."""
    group_B, mask_BT = (
        torch.tensor([0, 0, 0, 0, 1, 1]),
        torch.tensor([[True], [True], [True], [False], [False], [True]]),
    )
    wins_BN = torch.tensor([[0.5, 0.8], [0.4, 0.7], [0.6, 0.9], [0.5, 0.2], [0.5, 0.1], [0.4, 0.5]])
    rows = dataclasses.replace(batch(wins_BN, group_B), mask_BT=mask_BT, log_policy_B=torch.zeros(6))
    combiner = MOPO(thresholds={"b": 0.5}, dual=Projected(lr=1.0))
    found = {}
    for name, moving_BN in (("rollouts", torch.zeros(6, 2, dtype=torch.bool)), ("preferences", None)):
        state = combiner.init(["a", "b"], torch.ones(2))
        state = combiner.observe(dataclasses.replace(rows, moving_BN=moving_BN), state)
        found[name] = float(state["values"][1])
    assert found["rollouts"] == pytest.approx((0.65 + 0.3) / 2)
    assert found["preferences"] == pytest.approx((0.8 + 0.5) / 2)
