"""The clipped surrogate, the value loss and the estimates of divergence.

Legend: B sequences, T tokens, N objectives.
"""

import torch
from torch import Tensor

_LARGEST_LOG_RATIO = 20.0  # exp(20) is 4.9e8: far outside any clip range, far inside float32


def probability_ratio(logprobs_BT: Tensor, behaviour_logprobs_BT: Tensor) -> Tensor:
    """``u = pi / pi_old`` per token, from log-probabilities in nats; the log-ratio is held within +-20."""
    return (logprobs_BT - behaviour_logprobs_BT).clamp(-_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO).exp()


def clipped_surrogate(ratio_BT: Tensor, score_BT: Tensor, cliprange: float) -> Tensor:
    """Per-token loss ``-min(u A, clip(u, 1-eps, 1+eps) A)``.

    Args:
        ratio_BT: probability ratio u, with gradient.
        score_BT: combined advantage A, without gradient.
        cliprange: eps.

    Source: Schulman et al. 2017, arXiv 1707.06347, Eq. 7.
    """
    return -torch.minimum(ratio_BT * score_BT, ratio_BT.clamp(1 - cliprange, 1 + cliprange) * score_BT)


def value_loss(values_BTN: Tensor, old_values_BTN: Tensor, returns_BTN: Tensor, cliprange: float | None) -> Tensor:
    """Half the squared error of each value head; with ``cliprange`` the larger of clipped and unclipped error.

    Source: the reference implementation of PPO (Schulman et al. 2017); ``None`` leaves the clipping out.
    """
    error_BTN = (values_BTN - returns_BTN).square()
    if cliprange is not None:
        near_BTN = old_values_BTN + (values_BTN - old_values_BTN).clamp(-cliprange, cliprange)
        error_BTN = torch.maximum(error_BTN, (near_BTN - returns_BTN).square())
    return error_BTN / 2


def squared_log_ratio(logprobs_BT: Tensor, reference_logprobs_BT: Tensor) -> Tensor:
    """``(log pi - log pi_ref)^2 / 2`` per token: an estimate of the KL divergence that cannot overflow.

    On samples of the policy its gradient is, in expectation, that of ``KL(pi | pi_ref)``. There is no exponential
    in it, unlike in the estimate ``exp(-d) - 1 + d``, which overflows where the reference is far more certain.

    Source: "k2" in Schulman 2020, "Approximating KL divergence".
    """
    return (logprobs_BT - reference_logprobs_BT).square() / 2
