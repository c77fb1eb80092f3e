"""Gram matrices of the objectives' gradients.

Legend: B sequences, T tokens, N objectives, D hidden size.
"""

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
