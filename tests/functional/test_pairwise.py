"""DPO, IPO, MODPO and MRPO, against worked numbers and plain loops."""

import math

import pytest
import torch

from moa_lightning.functional import (
    clip_around_first,
    confidence_weights,
    dpo_loss,
    ipo_loss,
    modpo_logits,
    virtual_reference,
)


def test_dpo_by_hand():
    # Log-probabilities of a chosen and a rejected response under the policy (-1, -3) and its reference (-2, -2).
    logits = torch.tensor([0.1 * ((-1 + 2) - (-3 + 2))], dtype=torch.float64)
    assert dpo_loss(logits).item() == pytest.approx(math.log(1 + math.exp(-0.2)), abs=1e-12)
    smoothed = 0.9 * math.log(1 + math.exp(-0.2)) + 0.1 * math.log(1 + math.exp(0.2))
    assert dpo_loss(logits, label_smoothing=0.1).item() == pytest.approx(smoothed, abs=1e-12)


@pytest.mark.parametrize("beta", [0.05, 0.5])
def test_ipo_is_the_squared_distance_to_a_finite_target(beta):
    difference = torch.linspace(-30, 30, 7, dtype=torch.float64)
    torch.testing.assert_close(ipo_loss(beta * difference, beta), (difference - 1 / (2 * beta)).square())
    turned = ipo_loss(-beta * difference, beta)
    mixed = 0.8 * ipo_loss(beta * difference, beta) + 0.2 * turned
    torch.testing.assert_close(ipo_loss(beta * difference, beta, 0.2), mixed)


def test_losses_stay_finite_at_extremes():
    logits = torch.tensor([-1e4, 1e4], requires_grad=True)
    loss = dpo_loss(logits)
    loss.sum().backward()
    assert loss.tolist() == [1e4, 0.0] and torch.isfinite(logits.grad).all()


def test_modpo_worked_number():
    # beta .1, difference 2, weights (.5, .5), the other objective .4 higher on the chosen response: log 2.
    logits = modpo_logits(torch.tensor(2.0), torch.tensor(0.5 * 0.4), beta=0.1, weight=0.5)
    assert dpo_loss(logits).item() == pytest.approx(math.log(2), abs=1e-6)
    assert modpo_logits(torch.tensor(2.0), torch.tensor(0.0), 0.1, 1.0).item() == pytest.approx(0.2)  # DPO


def test_virtual_reference_worked_number():
    logprobs = torch.tensor([0.2, 0.5], dtype=torch.float64).log()
    assert virtual_reference(logprobs, torch.tensor([0.7, 0.3], dtype=torch.float64)).item() == pytest.approx(
        -1.410987, abs=1e-6
    )


def test_virtual_reference_lies_between_and_counts_the_unlikely_most():
    logprobs_BK = torch.tensor([[-1.0, -5.0], [-800.0, -900.0]], dtype=torch.float64)
    even_K = torch.tensor([0.5, 0.5], dtype=torch.float64)
    found_B = virtual_reference(logprobs_BK, even_K)
    assert ((found_B >= logprobs_BK.min(1).values) & (found_B <= logprobs_BK.max(1).values)).all()
    assert found_B.tolist() == pytest.approx([-5 + math.log(2) - math.log1p(math.exp(-4)), -900 + math.log(2)])
    torch.testing.assert_close(virtual_reference(logprobs_BK, torch.tensor([0.0, 1.0])), logprobs_BK[:, 1])


def test_clipping_holds_the_others_around_the_first():
    logprobs_BK = torch.tensor([[-10.0, -30.0, -10.5, -2.0]])
    assert clip_around_first(logprobs_BK, 0.1).tolist()[0] == pytest.approx([-10.0, -11.0, -10.5, -9.0])


def test_confidence_weights_against_a_loop():
    generator = torch.Generator().manual_seed(0)
    logprobs_BK = torch.randn(7, 3, generator=generator, dtype=torch.float64) * 5
    group_B = torch.tensor([0, 1, 0, 2, 1, 1, 3])
    logprobs_BK[2] = logprobs_BK[0]  # nobody tells the responses to prompt 0 apart
    found_BK = confidence_weights(logprobs_BK, group_B)
    for row, group in enumerate(group_B.tolist()):
        rows = [i for i in range(7) if group_B[i] == group]
        apart = [
            sum(abs(float(logprobs_BK[i, k] - logprobs_BK[j, k])) for i in rows for j in rows if i < j)
            for k in range(3)
        ]
        total = sum(apart)
        expected = [a / total for a in apart] if total else [1 / 3] * 3
        assert found_BK[row].tolist() == pytest.approx(expected)
