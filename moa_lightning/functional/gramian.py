"""Gram matrices of the objectives' gradients.

Legend: B sequences, T tokens, N objectives, D hidden size.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def representation_gramian(slopes_BTN: Tensor, squared_norms_BT: Tensor) -> Tensor:
    """Inner products of N objectives' gradients at the shared representation (the last hidden state).

    Token t's log-probability depends on no other position's last hidden state, so objective i's gradient there is
    ``slopes_ti * g_t`` with ``g_t = d log pi_t / d h_t`` the same for every objective. One backward pass through the
    language-model head gives all ``|g_t|^2``, and ``G_ij = sum_t slopes_ti slopes_tj |g_t|^2`` whatever N is.

    Args:
        slopes_BTN: derivative of each objective's loss by the token's log-probability; 0 on masked tokens.
        squared_norms_BT: ``|d log pi_t / d h_t|^2``.

    Returns:
        gram_NN, float32, of this process's tokens; sums over processes.

    Source: the objective of MGDA-UB (Sener & Koltun 2018, arXiv 1810.04650, section 3.3); the factorisation is ours.
    """
    weighted_BTN = slopes_BTN * squared_norms_BT.unsqueeze(-1)
    return torch.einsum("btn,btm->nm", weighted_BTN, slopes_BTN)


def parameter_gradients(
    logprobs_BT: Tensor, slopes_BTN: Tensor, parameters: Sequence[Tensor]
) -> tuple[tuple[Tensor, ...], ...]:
    """Gradients of N objectives at parameters, by one backward pass each; the graph is kept.

    Args:
        logprobs_BT: the tokens' log-probabilities, with their graph.
        slopes_BTN: derivative of each objective's loss by them; 0 on masked tokens.
        parameters: to differentiate by; one that the log-probabilities do not depend on has gradient 0.

    Returns:
        For each objective the gradients in the parameters' order and shapes.
    """
    return tuple(
        torch.autograd.grad(
            (logprobs_BT * slopes_BTN[..., i]).sum(), parameters, retain_graph=True, materialize_grads=True
        )
        for i in range(slopes_BTN.shape[-1])
    )


def weights_from_gramian(gram_NN: Tensor, weigh: Callable[[Tensor], Tensor], norm_power: float = 0.0) -> Tensor:
    """Weights of N objectives by a rule on the Gram matrix of their gradients, each scaled by its norm first.

    Objectives whose gradient is 0 are left out of the problem and get weight 0: they have nothing to lose. The rule
    gets the matrix in float64, scaled so that its largest diagonal element is 1.

    Args:
        gram_NN: symmetric, positive semi-definite.
        weigh: from the Gram matrix of the scaled gradients to their weights.
        norm_power: p; gradients are divided by the p-th power of their norm. 0 does not scale them.

    Returns:
        weights_N of the original gradients, float64; their magnitudes sum to 1, or all are 0. The rule determines only
        the direction of the weighted sum; the learning rate determines its length.

    Source: the scaling is GAPO's, Li et al. 2025, arXiv 2507.01915.

    Example: the rule that sums unit gradients gives the longer one the smaller weight.
        >>> gram = torch.tensor([[1.0, 0.0], [0.0, 9.0]])
        >>> weights_from_gramian(gram, lambda gram: torch.ones(len(gram)), norm_power=1.0).tolist()
        [0.75, 0.25]
    """
    gram_NN = gram_NN.double()
    norms_N = gram_NN.diagonal().sqrt()
    kept_N = norms_N > 0
    weights_N = torch.zeros_like(norms_N)
    if not kept_N.any():
        return weights_N
    # Norms in units of the largest: their powers can neither overflow nor underflow.
    largest = norms_N.max()
    scales_N = (norms_N[kept_N] / largest) ** -norm_power
    scaled_NN = gram_NN[kept_N][:, kept_N] / largest**2 * scales_N.outer(scales_N)
    weights_N[kept_N] = weigh(scaled_NN / scaled_NN.diagonal().max()).to(weights_N) * scales_N
    total = weights_N.abs().sum()
    return weights_N / total.where(total > 0, 1.0)
