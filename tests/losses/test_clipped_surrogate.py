import pytest
import torch

from moa_lightning.functional import clipped_surrogate, probability_ratio, squared_log_ratio, value_loss
from moa_lightning.losses import LossKL


@pytest.mark.parametrize(
    ("ratio", "score", "loss", "slope"),
    [
        (1.0, 2.0, -2.0, -2.0),
        (1.5, 2.0, -2.4, 0.0),  # clipped at 1.2
        (0.5, 2.0, -1.0, -2.0),  # a bad ratio for a good action still counts
        (0.5, -2.0, 1.6, 0.0),  # clipped at 0.8
        (1.5, -2.0, 3.0, 2.0),
    ],
)
def test_clipped_surrogate_by_hand(ratio, score, loss, slope):
    ratio_T = torch.tensor([ratio], requires_grad=True)
    value = clipped_surrogate(ratio_T, torch.tensor([score]), 0.2)
    value.backward()
    assert value.item() == pytest.approx(loss)
    assert ratio_T.grad.item() == pytest.approx(slope)


def test_ratios_cannot_overflow():
    ratio = probability_ratio(torch.tensor([500.0, -500.0, 0.1]), torch.zeros(3))
    assert torch.isfinite(ratio).all()
    assert ratio[2].item() == pytest.approx(1.1051709)


def test_value_loss_takes_the_larger_error():
    values, old, returns = torch.tensor([2.0, 0.1]), torch.tensor([0.0, 0.0]), torch.tensor([3.0, 1.0])
    assert value_loss(values, old, returns, None).tolist() == pytest.approx([0.5, 0.405])
    assert value_loss(values, old, returns, 0.2).tolist() == pytest.approx([0.5 * 2.8**2, 0.405])


def test_kl_in_the_loss_has_the_gradient_of_the_divergence():
    """On samples of the policy, in expectation: exact here, by summing over all actions."""
    logits = torch.randn(6, dtype=torch.float64, requires_grad=True)
    reference = torch.randn(6, dtype=torch.float64).log_softmax(-1)
    logprobs = logits.log_softmax(-1)
    expected = torch.autograd.grad((logprobs.exp() * (logprobs - reference)).sum(), logits, retain_graph=True)[0]
    estimate = torch.autograd.grad(
        (logprobs.exp().detach() * squared_log_ratio(logprobs, reference)).sum(), logits, retain_graph=True
    )[0]
    torch.testing.assert_close(estimate, expected)
    assert torch.isfinite(squared_log_ratio(torch.tensor([-1e4]), torch.tensor([0.0]))).all()
    assert LossKL(2.0).loss(torch.tensor([1.0]), torch.tensor([0.0])).item() == 1.0
    with pytest.raises(ValueError, match="beta >= 0"):
        LossKL(-1.0)
