import math

import pytest
import torch

from moa_lightning.losses import LossKL, RewardKL


def test_the_coefficient_moves_towards_its_target_by_the_papers_rule():
    kl = RewardKL(init_kl_coef=0.2, target=6.0, horizon=1000.0)
    state = kl.init()
    for observed, error in [(6.0, 0.0), (6.6, 0.1), (60.0, 0.2), (0.0, -0.2)]:
        after = kl.observe(observed, 64, state)
        factor = kl.reward_coefficient(after) / kl.reward_coefficient(state)
        step = error * 64 / 1000
        assert factor == pytest.approx(math.exp(step), rel=1e-6)
        assert abs(factor - (1 + step)) <= 0.51 * step**2 + 1e-6  # the paper's, to first order
        state = after
    fixed = RewardKL(init_kl_coef=0.3, target=None)
    assert fixed.reward_coefficient(fixed.observe(99.0, 64, fixed.init())) == pytest.approx(0.3)


@pytest.mark.parametrize("sequences", [50_000, 60_000, 10**9])
def test_no_batch_is_so_large_that_the_penalty_pays_for_divergence(sequences):
    kl = RewardKL()
    state = kl.init()
    for _ in range(1000):  # below the target for long: far, but never to 0
        before, state = kl.reward_coefficient(state), kl.observe(0.0, sequences, state)
        assert 0 < kl.reward_coefficient(state) <= before
    assert kl.reward_coefficient(kl.observe(0.0, 60_000, kl.init())) == pytest.approx(0.2 * math.exp(-0.2))
    assert kl.reward_coefficient(kl.observe(99.0, sequences, state)) > kl.reward_coefficient(state)
    free = RewardKL(init_kl_coef=0.0)
    assert free.reward_coefficient(free.observe(99.0, sequences, free.init())) == 0.0


@pytest.mark.parametrize("sequences", [64, 5_000, 60_000])
def test_a_policy_that_answers_the_coefficient_settles_at_the_target(sequences):
    kl = RewardKL(init_kl_coef=0.01, target=3.0, horizon=500.0 if sequences == 64 else 10_000.0)
    state = kl.init()
    for _ in range(400):
        divergence = 1.0 / kl.reward_coefficient(state)  # the more it costs, the less there is of it
        state = kl.observe(divergence, sequences, state)
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
        (lambda: LossKL(beta=-1.0), "finite beta >= 0, got -1.0"),
        (lambda: LossKL(beta=math.nan), "finite beta >= 0, got nan"),
        (lambda: LossKL(beta=math.inf), "finite beta >= 0, got inf"),
        (lambda: RewardKL(init_kl_coef=-0.1), "finite init_kl_coef >= 0, got -0.1"),
        (lambda: RewardKL(init_kl_coef=math.nan), "finite init_kl_coef >= 0, got nan"),
        (lambda: RewardKL(init_kl_coef=math.inf), "finite init_kl_coef >= 0, got inf"),
        (lambda: RewardKL(target=0.0), r"finite target > 0 \(or null\), got 0.0"),
        (lambda: RewardKL(target=math.nan), r"finite target > 0 \(or null\), got nan"),
        (lambda: RewardKL(target=math.inf), r"finite target > 0 \(or null\), got inf"),
        (lambda: RewardKL(horizon=0.0), "finite horizon > 0, got 0.0"),
        (lambda: RewardKL(horizon=math.nan), "finite horizon > 0, got nan"),
        (lambda: RewardKL(horizon=math.inf), "finite horizon > 0, got inf"),
    ],
)
def test_refuses_values_without_meaning(make, message):
    with pytest.raises(ValueError, match=message):
        make()
