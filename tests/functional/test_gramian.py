import pytest
import torch

from moa_lightning.functional import representation_gramian, token_logprobs


@pytest.mark.parametrize("count", [1, 2, 7])
def test_equals_the_gram_matrix_of_n_separate_backward_passes(count):
    generator = torch.Generator().manual_seed(count)
    hidden_BTD = torch.randn(3, 5, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    head_VD = torch.randn(11, 8, generator=generator, dtype=torch.float64)
    labels_BT = torch.randint(0, 11, (3, 5), generator=generator)
    slopes_BTN = torch.randn(3, 5, count, generator=generator, dtype=torch.float64)
    slopes_BTN[0, 3:] = 0.0  # masked tokens
    logprobs_BT = (hidden_BTD @ head_VD.T).log_softmax(-1).gather(-1, labels_BT.unsqueeze(-1)).squeeze(-1)
    rows = []
    for i in range(count):
        (gradient,) = torch.autograd.grad((slopes_BTN[..., i] * logprobs_BT).sum(), hidden_BTD, retain_graph=True)
        rows.append(gradient.flatten())
    jacobian_NX = torch.stack(rows)
    (gradient_BTD,) = torch.autograd.grad(logprobs_BT.sum(), hidden_BTD)
    torch.testing.assert_close(
        representation_gramian(slopes_BTN, gradient_BTD.square().sum(-1)), jacobian_NX @ jacobian_NX.T
    )


def test_through_the_chunked_log_probabilities_as_well():
    generator = torch.Generator().manual_seed(0)
    hidden_BTD = torch.randn(2, 4, 8, generator=generator, requires_grad=True)
    head = torch.nn.Linear(8, 13, bias=False)
    labels_BT = torch.randint(0, 13, (2, 4), generator=generator)
    chunked_BT, _ = token_logprobs(hidden_BTD, head, labels_BT, torch.ones(2, 4, dtype=torch.bool))
    whole_BT = head(hidden_BTD).log_softmax(-1).gather(-1, labels_BT.unsqueeze(-1)).squeeze(-1)
    (a,) = torch.autograd.grad(chunked_BT.sum(), hidden_BTD)
    (b,) = torch.autograd.grad(whole_BT.sum(), hidden_BTD)
    torch.testing.assert_close(a, b)
