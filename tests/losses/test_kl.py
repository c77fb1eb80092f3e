import math

import pytest
import torch

from moa_lightning.losses import LossKL, RewardKL


def test_the_coefficient_moves_towards_its_target_by_the_papers_rule():
    kl = RewardKL(init_kl_coef=0.2, target=6.0, horizon=1000.0)
    state = kl.init()
    for observed, factor in [(6.0, 1.0), (6.6, 1 + 0.1 * 64 / 1000), (60.0, 1 + 0.2 * 64 / 1000), (0.0, 1 - 0.0128)]:
        after = kl.observe(observed, 64, state)
        assert kl.reward_coefficient(after) == pytest.approx(kl.reward_coefficient(state) * factor, rel=1e-5)
        state = after
    fixed = RewardKL(init_kl_coef=0.3, target=None)
    assert fixed.reward_coefficient(fixed.observe(99.0, 64, fixed.init())) == pytest.approx(0.3)


def test_a_policy_that_answers_the_coefficient_settles_at_the_target():
    kl = RewardKL(init_kl_coef=0.01, target=3.0, horizon=500.0)
    state = kl.init()
    for _ in range(400):
        divergence = 1.0 / kl.reward_coefficient(state)  # the more it costs, the less there is of it
        state = kl.observe(divergence, 64, state)
    assert 1.0 / kl.reward_coefficient(state) == pytest.approx(3.0, rel=0.01)


def test_each_kind_charges_in_its_own_place_only():
    logprobs_BT, reference_BT = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-2.0, -2.0]])
    assert RewardKL().loss(logprobs_BT, reference_BT).tolist() == [[0.0, 0.0]]
    loss = LossKL(beta=2.0)
    assert loss.reward_coefficient(loss.init()) == 0.0
    assert loss.loss(logprobs_BT, reference_BT).tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize("gap", [1e2, 1e4, 1e8])
def test_no_form_overflows_where_an_exponential_would(gap):
    charge_BT = LossKL().loss(torch.tensor([[-gap]]), torch.tensor([[0.0]]))
    assert math.isfinite(float(charge_BT))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LossKL(beta=-1.0), "beta >= 0"),
        (lambda: RewardKL(init_kl_coef=-0.1), "init_kl_coef >= 0"),
        (lambda: RewardKL(target=0.0), "target > 0"),
    ],
)
def test_refuses_values_without_meaning(make, message):
    with pytest.raises(ValueError, match=message):
        make()
