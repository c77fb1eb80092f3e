import pytest
import torch

from moa_lightning.combiners import GDPO
from moa_lightning.functional import group_standardize
from tests.combiners import scored


def test_two_wins_are_worth_more_than_one():
    # methods: groups {(0,0),(1,0)} and {(0,0),(1,1)}.
    scores_BN = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    group_B, valid_BN = torch.tensor([0, 0, 1, 1]), torch.ones(4, 2, dtype=torch.bool)
    sums_B = group_standardize(scores_BN, valid_BN, group_B).sum(1)
    torch.testing.assert_close(sums_B, torch.tensor([-0.7071, 0.7071, -1.4142, 1.4142]), rtol=0, atol=5e-5)
    # Summed first, both groups look the same.
    summed_first_B1 = group_standardize(scores_BN.sum(1, keepdim=True), valid_BN[:, :1], group_B)
    torch.testing.assert_close(
        summed_first_B1[:, 0], torch.tensor([-0.7071, 0.7071, -0.7071, 0.7071]), rtol=0, atol=5e-5
    )
    # The batch step makes the mean square 1: (.5 + .5 + 2 + 2) / 4 = 1.25 before it.
    score_B = scored.run(GDPO(), scored.experience(scores_BN, group_B))[1].score
    torch.testing.assert_close(score_B, sums_B / 1.25**0.5)


@pytest.mark.parametrize("seed", range(3))
def test_against_a_plain_loop(seed):
    scores_BN, group_B = scored.draw(seed)
    scores_BN[1, 0] = torch.nan
    weights, expected = [0.5, 0.3, 0.2], []
    for row in range(12):
        prompt = scores_BN[group_B == group_B[row]].double()
        total = 0.0
        for i, weight in enumerate(weights):
            known = prompt[:, i][prompt[:, i].isfinite()]
            if scores_BN[row, i].isfinite():
                total += weight * float((scores_BN[row, i].double() - known.mean()) / known.std(correction=1))
        expected.append(total)
    expected_B = torch.tensor(expected).view(3, 4)
    expected_B = (expected_B - expected_B.mean(1, keepdim=True)).flatten()
    combined = scored.run(GDPO(dict(zip("abc", weights, strict=True))), scored.experience(scores_BN, group_B))[1]
    torch.testing.assert_close(combined.score, expected_B / expected_B.square().mean().sqrt(), rtol=1e-5, atol=1e-6)


def test_each_objective_may_have_a_unit_of_its_own():
    scores_BN, group_B = scored.draw()
    score_B = scored.run(GDPO(), scored.experience(scores_BN, group_B))[1].score
    other_BN = scores_BN * torch.tensor([1e-10, 1.0, 1e15]) + torch.tensor([0.0, 5.0, 0.0])
    torch.testing.assert_close(scored.run(GDPO(), scored.experience(other_BN, group_B))[1].score, score_B)


def test_an_objective_without_spread_adds_nothing():
    scores_BN, group_B = scored.draw()
    scores_BN[:4, 0] = 0.1 + 1e-8  # in float32, the mean of four equal numbers may differ from them
    z_BN = group_standardize(scores_BN, torch.ones(12, 3, dtype=torch.bool), group_B)
    assert torch.equal(z_BN[:4, 0], torch.zeros(4))
    torch.testing.assert_close(z_BN.view(3, 4, 3)[1:].std(1), torch.ones(2, 3))
