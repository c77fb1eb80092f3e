"""Win probabilities and grouped softmaxes against plain loops over Python numbers."""

import math

import pytest
import torch

from moa_lightning.functional import (
    bradley_terry_wins,
    fill_from_group,
    group_count,
    group_max,
    group_softmax,
    group_sum,
    mean_wins,
    truncated_log_ratio,
)

NAN = math.nan


def close(tensor, numbers, **tolerances):
    expected = torch.tensor(numbers, dtype=tensor.dtype)
    torch.testing.assert_close(tensor, expected, equal_nan=True, **tolerances)


def loop_of_mean_wins(wins):
    means = []
    for i, line in enumerate(wins):
        others = [p for j, p in enumerate(line) if j != i and not math.isnan(p)]
        means.append(sum(others) / len(others) if others else NAN)
    return means


def sigmoid(x):
    return 0.0 if x < -700 else 1 / (1 + math.exp(-x))


def loop_of_bradley_terry(scores, scale):
    return loop_of_mean_wins([[sigmoid((a - b) / scale) for b in scores] for a in scores])


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("missing", [0.0, 0.4, 1.0])
def test_mean_wins(count, missing):
    generator = torch.Generator().manual_seed(count)
    wins_KK = torch.rand(count, count, generator=generator, dtype=torch.float64)
    wins_KK[torch.rand(count, count, generator=generator) < missing] = NAN
    close(mean_wins(wins_KK), loop_of_mean_wins(wins_KK.tolist()))


def test_a_candidate_does_not_play_against_itself():
    close(mean_wins(torch.tensor([[0.9, 0.3], [0.7, 0.0]])), [0.3, 0.7])
    close(mean_wins(torch.tensor([[0.5]])), [NAN])


@pytest.mark.parametrize("candidates", [1, 2, 4])
@pytest.mark.parametrize("scale", [0.3, 1.0, 50.0])
@pytest.mark.parametrize("missing", [0.0, 0.4])
def test_bradley_terry(candidates, scale, missing):
    generator = torch.Generator().manual_seed(candidates)
    scores_PKN = 3 * torch.randn(3, candidates, 2, generator=generator, dtype=torch.float64)
    scores_PKN[torch.rand(3, candidates, 2, generator=generator) < missing] = NAN
    wins_PKN = bradley_terry_wins(scores_PKN, scale)
    for p in range(3):
        for n in range(2):
            close(wins_PKN[p, :, n], loop_of_bradley_terry(scores_PKN[p, :, n].tolist(), scale))


def test_all_win_half_their_games_on_the_whole():
    wins_PKN = bradley_terry_wins(torch.randn(5, 6, 3, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(wins_PKN.mean(1), torch.full((5, 3), 0.5))


def test_73_percent_at_one_scale():
    close(bradley_terry_wins(torch.tensor([[[2.0], [0.0]]]), 2.0)[0, :, 0], [0.7310586, 0.2689414])


def test_extreme_scores():
    """No overflow, and an infinite score is none: who is infinitely better than another infinite one?"""
    scores = [1e30, -1e30, 3e38, -3e38, 0.0]
    wins_PKN = bradley_terry_wins(torch.tensor(scores).reshape(1, 5, 1), 1e-3)
    assert wins_PKN.isfinite().all()
    close(wins_PKN[0, :2, 0], [0.75, 0.25])
    infinite = bradley_terry_wins(torch.tensor([math.inf, 1.0, 0.0]).reshape(1, 3, 1))[0, :, 0]
    close(infinite, [NAN, 0.7310586, 0.2689414])


@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_group_softmax_of_groups_that_do_not_stand_together(scale):
    generator = torch.Generator().manual_seed(1)
    group_B = torch.tensor([2, 0, 2, 1, 0, 2, 4, 2])  # 3 is empty, 1 and 4 hold one row
    logits_B = scale * torch.randn(8, generator=generator, dtype=torch.float64)
    expected = []
    for g, logit in zip(group_B.tolist(), logits_B.tolist(), strict=True):
        members = [other for h, other in zip(group_B.tolist(), logits_B.tolist(), strict=True) if h == g]
        expected.append(1 / sum(math.exp(min(other - logit, 700.0)) for other in members))
    close(group_softmax(logits_B, group_B), expected)
    order = torch.randperm(8, generator=generator)
    close(group_softmax(logits_B[order], group_B[order]), [expected[i] for i in order.tolist()])


def test_group_softmax_at_its_limits():
    group_B = torch.tensor([0, 1, 0, 1])
    close(group_softmax(torch.tensor([3e38, -3e38, -3e38, -3e38]), group_B), [1, 0.5, 0, 0.5])
    close(group_softmax(torch.tensor([-math.inf, 2.0, 0.0, 2.0]), group_B), [0, 0.5, 1, 0.5])
    assert group_softmax(torch.empty(0), torch.empty(0, dtype=torch.long)).shape == (0,)


def test_group_softmax_has_the_gradient_of_softmax():
    group_B = torch.tensor([1, 0, 1, 0, 1])
    logits_B = torch.randn(5, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    weights_B = torch.arange(5, dtype=torch.float64)
    (grouped,) = torch.autograd.grad((weights_B * group_softmax(logits_B, group_B)).sum(), logits_B)
    plain = sum((weights_B[rows] * logits_B[rows].softmax(0)).sum() for rows in (group_B == 0, group_B == 1))
    torch.testing.assert_close(grouped, torch.autograd.grad(plain, logits_B)[0])


def interleaved(seed=0, rows=11, groups=4):
    generator = torch.Generator().manual_seed(seed)
    group_B = torch.randint(0, groups, (rows,), generator=generator)
    return generator, torch.cat([group_B, torch.arange(groups)])  # every group has a row


def test_group_reductions_against_loops():
    generator, group_B = interleaved()
    values_BN = torch.randn(len(group_B), 3, generator=generator)
    for group in range(4):
        rows = [i for i, g in enumerate(group_B.tolist()) if g == group]
        torch.testing.assert_close(group_sum(values_BN, group_B)[group], values_BN[rows].sum(0))
        torch.testing.assert_close(group_max(values_BN, group_B)[group], values_BN[rows].amax(0))
        torch.testing.assert_close(group_max(values_BN[:, 0], group_B)[group], values_BN[rows, 0].max())
    assert group_count(group_B) == 4
    assert group_count(group_B[:0]) == 0


def test_a_group_without_any_mass_has_probability_zero():
    logits_B = torch.tensor([1.0, -torch.inf, -torch.inf, 2.0, -torch.inf])
    found_B = group_softmax(logits_B, torch.tensor([0, 0, 1, 2, 2]))
    assert found_B.tolist() == [1.0, 0.0, 0.0, 1.0, 0.0]


def test_what_is_unknown_becomes_the_mean_of_its_group():
    nan = torch.nan
    values_BN = torch.tensor([[0.2, nan], [nan, nan], [0.8, 0.5], [nan, 0.1], [0.6, 0.3]])
    found_BN = fill_from_group(values_BN, torch.tensor([0, 0, 0, 1, 1]))
    expected_BN = torch.tensor([[0.2, 0.5], [0.5, 0.5], [0.8, 0.5], [0.6, 0.1], [0.6, 0.3]])
    torch.testing.assert_close(found_BN, expected_BN)
    assert fill_from_group(torch.full((2, 1), nan), torch.zeros(2).long()).tolist() == [[0.0], [0.0]]


def test_only_differences_within_a_prompt_are_truncated():
    log_ratio_B = torch.tensor([8.0, 12.0, -9.0, -6.0])
    group_B = torch.tensor([0, 0, 1, 1])
    weights_B, ess_B, cut_B = truncated_log_ratio(log_ratio_B, group_B, 5.0)
    torch.testing.assert_close(group_softmax(weights_B, group_B), group_softmax(log_ratio_B, group_B))
    assert not cut_B.any()
    shares = torch.tensor([8.0, 12.0]).softmax(0)
    assert float(ess_B[0]) == pytest.approx(float(1 / shares.square().sum() / 2))
    weights_B, ess_B, cut_B = truncated_log_ratio(log_ratio_B, group_B, 1.8)
    assert weights_B.tolist() == pytest.approx([-1.8, 1.8, -1.5, 1.5])
    assert cut_B.tolist() == [True, True, False, False]
    assert ((ess_B > 0.5) & (ess_B <= 1)).all()


def test_equal_ratios_have_the_whole_effective_sample_size():
    _, ess_B, _ = truncated_log_ratio(torch.full((5,), 700.0), torch.tensor([0, 1, 0, 1, 0]), 5.0)
    torch.testing.assert_close(ess_B, torch.ones(5))
