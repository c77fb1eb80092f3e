import pytest
import torch

from moa_lightning.combiners import MGDAUB
from moa_lightning.functional import representation_gramian, token_logprobs
from tests.combiners.gradients import combine


@pytest.mark.parametrize(
    ("jacobian", "weights"),
    [
        ([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]], [0.6, 0.4]),
        ([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0], [-0.5, -0.5, 1.0]], [30 / 69, 11 / 69, 28 / 69]),
        ([[1.0, 0.0], [3.0, 0.0]], [1.0, 0.0]),
    ],
)
def test_worked_numbers(jacobian, weights):
    torch.testing.assert_close(combine(MGDAUB(), jacobian).mean_weights(), torch.tensor(weights), rtol=1e-4, atol=1e-5)


def test_normalised_gradients_share_by_angle_not_by_length():
    weights_N = combine(MGDAUB(normalize=True), [[100.0, 0.0], [0.0, 1.0]]).mean_weights()
    torch.testing.assert_close(weights_N, torch.tensor([1 / 101, 100 / 101]))


@pytest.mark.parametrize("seed", range(5))
def test_kkt_of_the_min_norm_point(seed):
    generator = torch.Generator().manual_seed(seed)
    jacobian = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    weights_N = combine(MGDAUB(max_iters=20_000, epsilon=1e-9), jacobian.tolist()).mean_weights().double()
    products_N = jacobian @ jacobian.T @ weights_N
    smallest = weights_N @ products_N
    assert (products_N >= smallest - 1e-3).all()
    active_N = products_N[weights_N > 1e-3]
    torch.testing.assert_close(active_N, smallest.expand_as(active_N), atol=2e-3, rtol=0)


def test_one_backward_through_the_head_gives_the_gram_matrix_of_n_backwards():
    """The factorised Gram matrix against N gradients at the hidden state, one autograd call each."""
    generator = torch.Generator().manual_seed(0)
    hidden_BTD = torch.randn(3, 4, 8, generator=generator, requires_grad=True)
    head_VD = torch.randn(11, 8, generator=generator)
    tokens_BT = torch.randint(11, (3, 4), generator=generator)
    mask_BT = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]]).bool()
    slopes_BTN = torch.randn(3, 4, 5, generator=generator) * mask_BT.unsqueeze(-1)
    logprobs_BT, _ = token_logprobs(hidden_BTD, lambda h: h @ head_VD.T, tokens_BT, mask_BT)
    gradients = [
        torch.autograd.grad((logprobs_BT * slopes_BTN[..., i]).sum(), hidden_BTD, retain_graph=True)[0].flatten()
        for i in range(5)
    ]
    expected_NN = torch.stack(gradients) @ torch.stack(gradients).T
    (gradient_BTD,) = torch.autograd.grad(logprobs_BT.sum(), hidden_BTD)
    gram_NN = representation_gramian(slopes_BTN, gradient_BTD.square().sum(-1))
    torch.testing.assert_close(gram_NN, expected_NN, rtol=1e-4, atol=1e-4)


def test_a_solver_that_cannot_run_is_refused():
    with pytest.raises(ValueError, match="max_iters >= 1"):
        MGDAUB(max_iters=0)
