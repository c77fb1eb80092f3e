"""The clipped surrogate, the value loss and the estimates of divergence.

Legend: B sequences, T tokens, N objectives.
"""

import torch
from torch import Tensor

_LARGEST_LOG_RATIO = 20.0  # exp(20) is 4.9e8: far outside any clip range, far inside float32


def probability_ratio(logprobs_BT: Tensor, behaviour_logprobs_BT: Tensor) -> Tensor:
    """``u = pi / pi_old`` per token, from log-probabilities in nats; the log-ratio is clipped to +-20."""
    return (logprobs_BT - behaviour_logprobs_BT).clamp(-_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO).exp()


def sequence_ratio(logprobs_BT: Tensor, behaviour_logprobs_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """``s = (pi(y) / pi_old(y))^(1/|y|)`` per response, (B, 1); the mean log-ratio of its tokens is clipped to +-20.

    Args:
        logprobs_BT: nats.
        behaviour_logprobs_BT: of the policy that sampled.
        mask_BT: bool, tokens that count; a response without any has ratio 1.

    Source: Zheng et al. 2025, "Group Sequence Policy Optimization", arXiv 2507.18071, Eq. 7.

    Example:
        >>> log_ratio_BT = torch.tensor([[0.3, -0.1, 9.0]])
        >>> round(sequence_ratio(log_ratio_BT, torch.zeros(1, 3), torch.tensor([[True, True, False]])).item(), 6)
        1.105171
    """
    log_ratio_BT = (logprobs_BT - behaviour_logprobs_BT).where(mask_BT, 0.0)
    mean_B1 = log_ratio_BT.sum(1, keepdim=True) / mask_BT.sum(1, keepdim=True).clamp(min=1)
    return mean_B1.clamp(-_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO).exp()


def clipped_surrogate(
    ratio_BT: Tensor, score_BT: Tensor, cliprange: float, epsilon_high: float | None = None, delta: float | None = None
) -> Tensor:
    """Per-token loss ``-min(u A, clip(u, 1-eps, 1+eps_high) A)``; with ``delta`` no more than ``-delta A`` for A < 0.

    Args:
        ratio_BT: probability ratio u, with gradient.
        score_BT: combined advantage A, without gradient.
        cliprange: eps.
        epsilon_high: eps_high; ``None`` is eps.
        delta: bound of the ratio for A < 0, above 1 + eps_high; ``None`` is no bound.

    Source: Schulman et al. 2017, arXiv 1707.06347, Eq. 7. ``epsilon_high``: Yu et al. 2025, "DAPO", arXiv 2503.14476.
    ``delta``: Ye et al. 2020, arXiv 1912.09729 (dual clip); verl calls it ``clip_ratio_c``.

    Example:
        >>> u, A = torch.tensor([1.5, 1.5, 4.0]), torch.tensor([1.0, -1.0, -1.0])
        >>> [round(x, 6) for x in clipped_surrogate(u, A, 0.2, epsilon_high=0.28, delta=3.0).tolist()]
        [-1.28, 1.5, 3.0]
    """
    high = cliprange if epsilon_high is None else epsilon_high
    bounded_BT = ratio_BT if delta is None else ratio_BT.clamp(max=delta)
    return -torch.minimum(bounded_BT * score_BT, ratio_BT.clamp(1 - cliprange, 1 + high) * score_BT)


def is_clipped(
    ratio_BT: Tensor, score_BT: Tensor, cliprange: float, epsilon_high: float | None = None, delta: float | None = None
) -> Tensor:
    """Bool: where :func:`clipped_surrogate` is flat, so that the ratio gets no gradient.

    That is ``A > 0, u > 1 + eps_high`` and ``A < 0, u < 1 - eps`` and, with ``delta``, ``A < 0, u > delta``.

    Example:
        >>> u, A = torch.tensor([1.5, 1.5, 4.0, 0.5]), torch.tensor([1.0, -1.0, -1.0, -1.0])
        >>> is_clipped(u, A, 0.2, epsilon_high=0.28, delta=3.0).tolist()
        [True, False, True, True]
    """
    high = cliprange if epsilon_high is None else epsilon_high
    flat_BT = ((score_BT > 0) & (ratio_BT > 1 + high)) | ((score_BT < 0) & (ratio_BT < 1 - cliprange))
    return flat_BT if delta is None else flat_BT | ((score_BT < 0) & (ratio_BT > delta))


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
