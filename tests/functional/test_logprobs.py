"""Log-probabilities and entropies by chunks: values, gradients, and what stays in memory."""

import gc

import pytest
import torch
from torch import nn

from moa_lightning.functional.logprobs import token_logprobs


def parts(seed=0, tokens=24, vocabulary=50, hidden=6):
    generator = torch.Generator().manual_seed(seed)
    hidden_BTD = torch.randn(2, tokens, hidden, generator=generator).requires_grad_()
    weight_VD = torch.randn(vocabulary, hidden, generator=generator).requires_grad_()
    tokens_BT = torch.randint(vocabulary, (2, tokens), generator=generator)
    mask_BT = torch.rand(2, tokens, generator=generator) < 0.8
    return hidden_BTD, weight_VD, tokens_BT, mask_BT


@pytest.mark.parametrize("chunk_size", [7, 1024])
@pytest.mark.parametrize(("of_logprob", "of_entropy"), [(1.0, 0.0), (0.0, 1.0), (0.7, -0.3)])
def test_values_and_gradients_are_those_of_the_plain_log_softmax(chunk_size, of_logprob, of_entropy):
    hidden_BTD, weight_VD, tokens_BT, mask_BT = parts()
    logprobs_BT, entropy_BT = token_logprobs(
        hidden_BTD, lambda h: h @ weight_VD.T, tokens_BT, mask_BT, 0.7, chunk_size=chunk_size
    )
    all_BTV = (hidden_BTD @ weight_VD.T / 0.7).log_softmax(-1)
    plain_BT = all_BTV.gather(-1, tokens_BT.unsqueeze(-1)).squeeze(-1).where(mask_BT, 0.0)
    plain_entropy_BT = -(all_BTV.exp() * all_BTV).sum(-1).where(mask_BT, 0.0)
    torch.testing.assert_close(logprobs_BT, plain_BT, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy_BT, plain_entropy_BT, rtol=1e-5, atol=1e-5)

    factor_BT = torch.linspace(-1, 1, mask_BT.numel()).view_as(mask_BT)

    def gradients(logprobs, entropy):
        losses = [w * (v * factor_BT).sum() for w, v in ((of_logprob, logprobs), (of_entropy, entropy)) if w]
        return torch.autograd.grad(sum(losses), (hidden_BTD, weight_VD))

    for ours, plain in zip(gradients(logprobs_BT, entropy_BT), gradients(plain_BT, plain_entropy_BT), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


def test_a_forbidden_token_leaves_finite_gradients():
    hidden_BTD, weight_VD, tokens_BT, mask_BT = parts()
    forbidden_V = torch.zeros(50).index_fill(0, torch.tensor([3]), -torch.inf)
    tokens_BT = tokens_BT.where(tokens_BT != 3, 4)
    logprobs_BT, entropy_BT = token_logprobs(
        hidden_BTD, lambda h: h @ weight_VD.T + forbidden_V, tokens_BT, mask_BT, chunk_size=7
    )
    (gradient_BTD,) = torch.autograd.grad((logprobs_BT + entropy_BT).sum(), hidden_BTD)
    assert torch.isfinite(entropy_BT).all() and torch.isfinite(gradient_BTD).all()


def test_no_chunk_of_logits_outlives_its_backward_pass():
    # Without an entropy bonus too, and while the graph is kept for a second pass (as MGDA-UB does).
    hidden_BTD, _, tokens_BT, mask_BT = parts(tokens=40, vocabulary=61)
    head = nn.Linear(6, 61, bias=False)
    logprobs_BT, _ = token_logprobs(hidden_BTD, head, tokens_BT, mask_BT, chunk_size=8)
    torch.autograd.grad(logprobs_BT.sum(), hidden_BTD, retain_graph=True)
    gc.collect()
    alive = [t for t in gc.get_objects() if type(t) is torch.Tensor and t.ndim == 2 and t.shape[1] == 61]
    assert [tuple(t.shape) for t in alive if t.shape[0] <= 8] == []
