import pytest
import torch

from moa_lightning.combiners import GDPO, RVPO
from moa_lightning.functional import group_standardize, soft_minimum
from tests.combiners import scored

Z = torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.float64)


def soft(values_BN, k, weights=(1.0, 1.0, 1.0)):
    return soft_minimum(values_BN, torch.tensor(weights, dtype=torch.float64), k)[0].item()


def test_the_worked_number():
    assert soft(Z, 1.0) == pytest.approx(-1.025261, abs=5e-7)


def test_its_limits_are_the_mean_and_the_minimum():
    for k in (1e-3, 1e-8, 1e-15, 1e-300):
        # To second order: the mean less k/2 times the variance.
        expected = float(Z.mean() - k / 2 * Z.var(correction=0))
        assert soft(Z, k) == pytest.approx(expected, abs=2 * k**2 + 1e-15)
    for k in (1e3, 1e8, 1e300):
        assert soft(Z, k) == pytest.approx(-2.0, abs=2 / k + 1e-15)
    assert soft(Z, 1e-12, (1.0, 0.0, 3.0)) == pytest.approx((1.0 + 1.5) / 4)
    assert soft(Z, 1e12, (1.0, 0.0, 3.0)) == pytest.approx(0.5)


def test_more_aversion_never_raises_the_score():
    scores = [soft(Z, k) for k in (1e-6, 0.1, 1.0, 3.0, 10.0, 100.0)]
    assert scores == sorted(scores, reverse=True)


@pytest.mark.parametrize("k", [0.3, 1.0, 5.0])
def test_against_the_formula_as_it_stands(k):
    scores_BN, group_B = scored.draw()
    z_BN = group_standardize(scores_BN.double(), torch.ones(12, 3, dtype=torch.bool), group_B)
    raw_B = -torch.log(torch.exp(-k * z_BN).mean(1)) / k
    centred_B = (raw_B.view(3, 4) - raw_B.view(3, 4).mean(1, keepdim=True)).flatten()
    score_B = scored.run(RVPO(k=k), scored.experience(scores_BN, group_B))[1].score
    torch.testing.assert_close(score_B, (centred_B / centred_B.square().mean().sqrt()).float(), rtol=1e-5, atol=1e-5)


def test_without_aversion_it_is_gdpo():
    weights = {"a": 0.5, "b": 0.3, "c": 0.2}
    rows = scored.experience(*scored.draw())
    score_B = scored.run(RVPO(1e-9, weights), rows)[1].score
    torch.testing.assert_close(score_B, scored.run(GDPO(weights), rows)[1].score)
    for k in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="RVPO needs a finite k > 0"):
            RVPO(k=k)


def test_consistency_beats_a_better_mean():
    scores_BN = torch.tensor([[0.5, 0.5], [3.0, 0.0], [-1.0, 1.0], [-1.0, -1.0]])  # the second is only average in b
    rows = scored.experience(scores_BN, torch.zeros(4, dtype=torch.int64))
    assert scored.run(RVPO(k=5.0), rows)[1].score.argmax() == 0
    assert scored.run(GDPO(), rows)[1].score.argmax() == 1


def test_an_objective_that_scored_no_response_to_a_prompt_is_left_out_of_it():
    scores_BN, group_B = scored.draw()
    missing_BN = scores_BN.clone()
    missing_BN[:4, 0] = torch.nan
    score_B = scored.run(RVPO(k=3.0), scored.experience(missing_BN, group_B))[1].score[:4]
    alone_B = scored.run(RVPO(k=3.0), scored.experience(scores_BN[:4, 1:], group_B[:4]))[1].score
    torch.testing.assert_close(score_B / score_B.norm(), alone_B / alone_B.norm())
