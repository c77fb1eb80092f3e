import math

import pytest
import torch

from moa_lightning.combiners import SmoothTchebycheff, Tchebycheff
from moa_lightning.functional import smooth_tchebycheff, tchebycheff
from tests.combiners import scored


@pytest.mark.parametrize("objectives", [1, 2, 16])
@pytest.mark.parametrize("mu", [1e-30, 1e-3, 0.1, 10.0])
def test_the_gap_to_tchebycheff_is_at_most_mu_log_n(objectives, mu):
    scores_BN = scored.draw(objectives=objectives)[0].double()
    ideal_N, weights_N = torch.full((objectives,), 2.0).double(), torch.rand(objectives).double() + 0.1
    gap_B = tchebycheff(scores_BN, ideal_N, weights_N)[0] - smooth_tchebycheff(scores_BN, ideal_N, weights_N, mu)[0]
    assert (gap_B >= -1e-12).all()
    assert (gap_B <= mu * math.log(objectives) + 1e-12).all()
    # The bound is reached where all objectives are equally far.
    equal_B = smooth_tchebycheff(torch.ones(1, objectives).double(), ideal_N, torch.ones(objectives).double(), mu)[0]
    torch.testing.assert_close(equal_B, torch.tensor([-1.0 - mu * math.log(objectives)]).double())


@pytest.mark.parametrize("scale", [1e-10, 1.0, 1e15])
def test_nothing_overflows(scale):
    scores_BN, ideal_N = scored.draw()[0] * scale, torch.full((3,), 2 * scale)
    for mu in (1e-30, 1e-10, 1.0, 1e10):
        score_B, shares_BN = smooth_tchebycheff(scores_BN, ideal_N, torch.ones(3), mu)
        assert torch.isfinite(score_B).all()
        torch.testing.assert_close(shares_BN.sum(1), torch.ones(12))


def test_the_shares_are_its_gradient():
    scores_BN = scored.draw()[0].double().requires_grad_()
    weights_N = torch.tensor([0.5, 0.3, 0.2]).double()
    score_B, shares_BN = smooth_tchebycheff(scores_BN, torch.ones(3).double(), weights_N, 0.1)
    (slopes_BN,) = torch.autograd.grad(score_B.sum(), scores_BN)
    torch.testing.assert_close(slopes_BN, shares_BN.detach() * weights_N)


def test_its_limit_is_tchebycheff():
    rows = scored.experience(*scored.draw())
    expected = scored.run(Tchebycheff(), rows)[1]
    combined = scored.run(SmoothTchebycheff(mu=1e-6), rows)[1]
    torch.testing.assert_close(combined.score, expected.score, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(combined.mean_weights(), expected.mean_weights(), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="finite mu > 0, got 0; its limit at 0 is Tchebycheff"):
        SmoothTchebycheff(mu=0)
