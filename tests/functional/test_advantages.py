"""GAE, group-relative advantages and masked sums against plain loops."""

import math

import pytest
import torch

from moa_lightning.functional import gae, group_relative, masked_sum


def right_padded(seed, rows=6, tokens=9, objectives=3):
    """Rewards, values and a mask; one row of full length, one with a single token, one empty."""
    generator = torch.Generator().manual_seed(seed)
    rewards_BTN = torch.randn(rows, tokens, objectives, generator=generator, dtype=torch.float64)
    values_BTN = torch.randn(rows, tokens, objectives, generator=generator, dtype=torch.float64)
    lengths_B = torch.randint(0, tokens + 1, (rows,), generator=generator)
    lengths_B[:3] = torch.tensor([tokens, 1, 0])
    return rewards_BTN, values_BTN, torch.arange(tokens) < lengths_B.unsqueeze(1)


def gae_by_sums(rewards, values, gamma, lam):
    """One stream of one row, from the definition: a sum of discounted errors for each token."""
    length = len(rewards)
    following = [*values[1:], 0.0]
    errors = [rewards[t] + gamma * following[t] - values[t] for t in range(length)]
    return [sum((gamma * lam) ** (s - t) * errors[s] for s in range(t, length)) for t in range(length)]


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.0])
@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_gae_is_the_sum_of_discounted_errors(gamma, lam, seed):
    rewards_BTN, values_BTN, mask_BT = right_padded(seed)
    advantages_BTN, returns_BTN = gae(rewards_BTN, values_BTN, mask_BT, gamma, lam)
    expected_BTN = torch.zeros_like(rewards_BTN)
    for b, length in enumerate(mask_BT.sum(1).tolist()):
        for n in range(rewards_BTN.shape[2]):
            stream = gae_by_sums(rewards_BTN[b, :length, n].tolist(), values_BTN[b, :length, n].tolist(), gamma, lam)
            expected_BTN[b, :length, n] = torch.tensor(stream, dtype=torch.float64)
    torch.testing.assert_close(advantages_BTN, expected_BTN)
    torch.testing.assert_close(returns_BTN, (expected_BTN + values_BTN) * mask_BT.unsqueeze(-1))


def test_lambda_0_is_the_error_of_one_step():
    rewards_BTN, values_BTN, mask_BT = right_padded(2)
    advantages_BTN, _ = gae(rewards_BTN, values_BTN, mask_BT, 0.9, 0.0)
    masked_BTN = values_BTN * mask_BT.unsqueeze(-1)
    following_BTN = torch.cat([masked_BTN[:, 1:], torch.zeros_like(masked_BTN[:, :1])], 1)
    expected_BTN = (rewards_BTN + 0.9 * following_BTN - values_BTN) * mask_BT.unsqueeze(-1)
    torch.testing.assert_close(advantages_BTN, expected_BTN)


def test_lambda_1_is_the_reward_to_come_less_the_value():
    rewards_BTN, values_BTN, mask_BT = right_padded(3)
    advantages_BTN, returns_BTN = gae(rewards_BTN, values_BTN, mask_BT, 1.0, 1.0)
    kept_BTN = rewards_BTN * mask_BT.unsqueeze(-1)
    to_come_BTN = kept_BTN.flip(1).cumsum(1).flip(1) * mask_BT.unsqueeze(-1)
    torch.testing.assert_close(returns_BTN, to_come_BTN)
    torch.testing.assert_close(advantages_BTN, (to_come_BTN - values_BTN) * mask_BT.unsqueeze(-1))


def test_gae_worked_numbers():
    """Reward 1 on the last of three tokens, gamma 1, lambda .5: errors .1, .2, .4."""
    rewards_BTN = torch.tensor([0.0, 0.0, 1.0, 9.0]).reshape(1, 4, 1)
    values_BTN = torch.tensor([0.3, 0.4, 0.6, 9.0]).reshape(1, 4, 1)
    advantages_BTN, returns_BTN = gae(rewards_BTN, values_BTN, torch.tensor([[1, 1, 1, 0]]), 1.0, 0.5)
    torch.testing.assert_close(advantages_BTN.flatten(), torch.tensor([0.3, 0.4, 0.4, 0.0]))
    torch.testing.assert_close(returns_BTN.flatten(), torch.tensor([0.6, 0.8, 1.0, 0.0]))


def test_each_objective_and_row_is_a_stream_of_its_own():
    rewards_BTN, values_BTN, mask_BT = right_padded(4)
    whole = gae(rewards_BTN, values_BTN, mask_BT, 0.9, 0.8)
    for n in range(rewards_BTN.shape[2]):
        alone = gae(rewards_BTN[..., n : n + 1], values_BTN[..., n : n + 1], mask_BT, 0.9, 0.8)
        torch.testing.assert_close(whole[0][..., n : n + 1], alone[0], rtol=0, atol=0)
    for b in range(len(mask_BT)):
        alone = gae(rewards_BTN[b : b + 1], values_BTN[b : b + 1], mask_BT[b : b + 1], 0.9, 0.8)
        torch.testing.assert_close(whole[1][b : b + 1], alone[1], rtol=0, atol=0)


@pytest.mark.parametrize("hidden", [math.nan, math.inf, 1e30])
def test_what_the_padding_holds_does_not_matter(hidden):
    rewards_BTN, values_BTN, mask_BT = right_padded(5)
    padding_BT1 = ~mask_BT.unsqueeze(-1)
    got = gae(rewards_BTN.masked_fill(padding_BT1, hidden), values_BTN.masked_fill(padding_BT1, hidden), mask_BT)
    torch.testing.assert_close(got, gae(rewards_BTN, values_BTN, mask_BT), rtol=0, atol=0)
    assert (got[0][~mask_BT] == 0).all() and (got[1][~mask_BT] == 0).all()


@pytest.mark.parametrize("tokens", [0, 1])
def test_the_shortest_batches(tokens):
    advantages_BTN, returns_BTN = gae(
        torch.ones(2, tokens, 3), torch.full((2, tokens, 3), 0.25), torch.ones(2, tokens, dtype=torch.bool)
    )
    torch.testing.assert_close(advantages_BTN, torch.full((2, tokens, 3), 0.75))
    torch.testing.assert_close(returns_BTN, torch.ones(2, tokens, 3))


@pytest.mark.parametrize(
    ("rewards", "values", "mask"),
    [
        ((2, 3, 4), (2, 3, 5), (2, 3)),
        ((2, 3, 4), (2, 3, 4), (2, 4)),
        ((2, 3, 4), (2, 3, 4), (3, 3)),
        ((2, 3), (2, 3), (2, 3)),  # one objective still needs its dimension
        ((2, 3, 4), (2, 3, 4), (2, 3, 1)),
    ],
)
def test_gae_refuses_shapes_that_do_not_agree(rewards, values, mask):
    with pytest.raises(ValueError, match=r"one shape \(B, T, N\) and a mask \(B, T\); got") as caught:
        gae(torch.zeros(rewards), torch.zeros(values), torch.ones(mask, dtype=torch.bool))
    assert "\n" not in str(caught.value)


def group_relative_by_loops(rewards_BN, valid_BN, size, scale):
    expected = [[0.0] * rewards_BN.shape[1] for _ in rewards_BN]
    for start in range(0, len(rewards_BN), size):
        for n in range(rewards_BN.shape[1]):
            rows = [b for b in range(start, start + size) if valid_BN[b, n]]
            if len(rows) < 2:
                continue
            rewards = [float(rewards_BN[b, n]) for b in rows]
            mean = sum(rewards) / len(rewards)
            deviation = math.sqrt(sum((r - mean) ** 2 for r in rewards) / (len(rewards) - 1))
            for b, reward in zip(rows, rewards, strict=True):
                expected[b][n] = (reward - mean) / (deviation + 1e-4 if scale else 1.0)
    return torch.tensor(expected, dtype=rewards_BN.dtype)


@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("size", [2, 3, 4, 6])
def test_group_relative_against_loops_with_missing_rows(size, scale):
    generator = torch.Generator().manual_seed(size)
    counts = set()
    for share in (1.0, 0.7, 0.3):
        rewards_BN = torch.randn(24, 5, generator=generator, dtype=torch.float64) * 3 + 7
        valid_BN = torch.rand(24, 5, generator=generator) < share
        counts |= set(valid_BN.unflatten(0, (-1, size)).sum(1).flatten().tolist())
        expected_BN = group_relative_by_loops(rewards_BN, valid_BN, size, scale)
        torch.testing.assert_close(group_relative(rewards_BN, valid_BN, size, scale), expected_BN)
        hidden_BN = rewards_BN.masked_fill(~valid_BN, math.nan)
        torch.testing.assert_close(group_relative(hidden_BN, valid_BN, size, scale), expected_BN)
    assert counts >= {0, 1, size}, "no group of these is empty, single or whole"


def test_group_relative_worked_numbers():
    rewards_BN = torch.tensor([[1.0, 5.0], [3.0, 5.0], [0.0, 2.0], [9.0, 4.0]])
    valid_BN = torch.tensor([[True, True], [True, True], [True, True], [False, True]])
    got_BN = group_relative(rewards_BN, valid_BN, 2)
    torch.testing.assert_close(got_BN, torch.tensor([[-1.0, 0.0], [1.0, 0.0], [0.0, -1.0], [0.0, 1.0]]))
    scaled_BN = group_relative(rewards_BN, valid_BN, 2, scale=True)
    assert scaled_BN[:, 1].tolist()[:2] == [0.0, 0.0]  # equal rewards: no division by 0
    assert scaled_BN[1, 0].item() == pytest.approx(1 / (math.sqrt(2) + 1e-4))


@pytest.mark.parametrize(("batch", "size"), [(4, 1), (4, 3), (4, 0), (5, 2)])
def test_group_relative_refuses_groups_that_do_not_fit(batch, size):
    with pytest.raises(ValueError, match=f"got groups of {size} in a batch of {batch}"):
        group_relative(torch.zeros(batch, 1), torch.ones(batch, 1, dtype=torch.bool), size)


def test_masked_sums_leave_nan_out():
    generator = torch.Generator().manual_seed(0)
    values_BTN = torch.randn(4, 5, 3, generator=generator, dtype=torch.float64)
    mask_BTN = torch.rand(4, 5, 3, generator=generator) < 0.5
    mask_BTN[..., 2] = False
    total_N, count_N = masked_sum(values_BTN.masked_fill(~mask_BTN, math.nan), mask_BTN, (0, 1))
    for n in range(3):
        kept = values_BTN[..., n][mask_BTN[..., n]].tolist()
        assert total_N[n].item() == pytest.approx(math.fsum(kept))
        assert count_N[n].item() == len(kept)
    assert count_N[2] == 0 and count_N[:2].min() > 0


def test_masked_sums_add_up_and_broadcast():
    values_BTN = torch.arange(24.0).reshape(4, 2, 3)
    mask_B11 = torch.tensor([True, False, True, True]).reshape(4, 1, 1)
    whole = masked_sum(values_BTN, mask_B11, (0, 1))
    halves = [masked_sum(values_BTN[rows], mask_B11[rows], (0, 1)) for rows in (slice(0, 2), slice(2, 4))]
    for together, first, second in zip(whole, *halves, strict=True):
        torch.testing.assert_close(together, first + second)
    assert whole[1].tolist() == [6.0, 6.0, 6.0]
