"""Losses on pairs of responses, and what a policy is compared with when there are several references.

Legend: P pairs, B responses, T tokens, K references. The log-ratio of a response is ``D = log pi(y|x) - log
pi_ref(y|x)``, over the whole response unless it is averaged over its tokens (:func:`response_log_ratio`).
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def response_log_ratio(log_ratio_BT: Tensor, mask_BT: Tensor, average: bool = False) -> Tensor:
    """``D`` of each response, (B,): the sum of its tokens' log-ratios, or their mean.

    Args:
        log_ratio_BT: ``log pi - log pi_ref`` per token, in nats.
        mask_BT: bool, tokens that count; a response without any has 0.
        average: divide by the number of tokens.

    Example:
        >>> log_ratio_BT = torch.tensor([[1.0, 2.0, 9.0], [0.5, 0.5, 0.5]])
        >>> mask_BT = torch.tensor([[True, True, False], [True, True, True]])
        >>> response_log_ratio(log_ratio_BT, mask_BT).tolist(), response_log_ratio(log_ratio_BT, mask_BT, True).tolist()
        ([3.0, 1.5], [1.5, 0.5])
    """
    sum_B = log_ratio_BT.where(mask_BT, 0.0).sum(1)
    return sum_B / mask_BT.sum(1).clamp(min=1) if average else sum_B


def dpo_loss(logits_P: Tensor, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """``-log sigmoid(z)`` for each pair.

    Args:
        logits_P: ``z = beta (D_chosen - D_rejected)``, or :func:`modpo_logits`.
        beta: of the logits; not used again.
        label_smoothing: probability that a label is the wrong way round; it mixes in ``-log sigmoid(-z)``.

    Source: Rafailov et al. 2023, arXiv 2305.18290, eq. 7.

    Example:
        >>> round(dpo_loss(torch.tensor(0.2)).item(), 6)
        0.598139
    """
    return -(1 - label_smoothing) * logsigmoid(logits_P) - label_smoothing * logsigmoid(-logits_P)


def ipo_loss(logits_P: Tensor, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """``(D_chosen - D_rejected - 1 / (2 beta))^2`` for each pair: its optimum is finite even where labels are certain.

    Args:
        logits_P: ``z = beta (D_chosen - D_rejected)``, or :func:`modpo_logits`.
        beta: of the logits; ``tau`` in the paper.
        label_smoothing: probability that a label is the wrong way round; it mixes in the loss of the turned pair.

    Source: Azar et al. 2023, arXiv 2310.12036, eq. 17.

    Example:
        >>> round(ipo_loss(torch.tensor(0.2), beta=0.1).item(), 6)  # a difference of 2, led to 5
        9.0
    """
    right, wrong = (logits_P - 0.5) / beta, (logits_P + 0.5) / beta
    return (1 - label_smoothing) * right.square() + label_smoothing * wrong.square()


def modpo_logits(difference_P: Tensor, margin_P: Tensor, beta: float, weight: float) -> Tensor:
    """``(beta (D_chosen - D_rejected) - margin) / w_k``: DPO on objective k, the other objectives as a margin.

    Args:
        difference_P: ``D_chosen - D_rejected``.
        margin_P: ``sum_{j != k} w_j (r_j(chosen) - r_j(rejected))``.
        beta: strength of the KL regularisation.
        weight: ``w_k`` in (0, 1], of the objective that the pairs were labelled for.

    Source: Zhou et al. 2023, "Beyond One-Preference-Fits-All Alignment", arXiv 2310.03708.

    Example:
        >>> modpo_logits(torch.tensor(2.0), torch.tensor(0.5 * 0.4), 0.1, 0.5).item()
        0.0
    """
    return (beta * difference_P - margin_P) / weight


def virtual_reference(logprobs_BK: Tensor, weights_BK: Tensor) -> Tensor:
    """``log p~ = -log sum_k a_k / p_k``: a virtual reference, the weighted harmonic mean of K references.

    Args:
        logprobs_BK: log-probabilities of responses under each reference.
        weights_BK: a, which add to 1 over K; may be broadcast.

    Returns:
        (B,)

    Source: Le et al. 2024, "Multi-Reference Preference Optimization", arXiv 2405.16388.

    Example:
        >>> p = torch.tensor([0.2, 0.5], dtype=torch.float64)
        >>> round(virtual_reference(p.log(), torch.tensor([0.7, 0.3])).item(), 6)
        -1.410987
    """
    return -torch.logsumexp(weights_BK.log() - logprobs_BK, -1)


def clip_around_first(logprobs_BK: Tensor, clip_range: float) -> Tensor:
    """Clip every reference's log-probability to ``1 +- clip_range`` times that of the first one.

    Otherwise a reference with a far smaller probability than the first would dominate the harmonic mean.

    Source: Le et al. 2024, arXiv 2405.16388 (clipped trust regions).
    """
    first_B1 = logprobs_BK[..., :1]
    return torch.maximum(torch.minimum(logprobs_BK, (1 - clip_range) * first_B1), (1 + clip_range) * first_B1)


def confidence_weights(logprobs_BK: Tensor, group_B: Tensor) -> Tensor:
    """Weight of each reference, by how far apart it puts the responses to a prompt: ``|log p_k(y) - log p_k(y')|``.

    With more than two responses it is the mean over their pairs. If no reference distinguishes them, weights are equal.

    Args:
        logprobs_BK: log-probabilities of responses under each reference.
        group_B: int64, the prompt that a response belongs to.

    Returns:
        weights_BK, the same within a prompt, adding to 1 over K.

    Source: Le et al. 2024, arXiv 2405.16388 (adaptive reference weights). Which response was chosen has no effect.
    """
    same_BB = (group_B.unsqueeze(1) == group_B).to(logprobs_BK.dtype)
    apart_BBK = (logprobs_BK.unsqueeze(1) - logprobs_BK).abs()
    # Over ordered pairs of each response's own prompt: the sum over j, summed again over the rows of the prompt.
    total_BK = same_BB @ (same_BB.unsqueeze(-1) * apart_BBK).sum(1)
    sum_B1 = total_BK.sum(-1, keepdim=True)
    even = 1 / logprobs_BK.shape[-1]
    return torch.where(sum_B1 > 0, total_BK / sum_B1.clamp(min=torch.finfo(sum_B1.dtype).tiny), even)
