"""Win probabilities and softmaxes within the candidates of a prompt.

Legend: P prompts, K candidates of one prompt, B candidates of all prompts in a batch, N objectives.
"""

import torch
from torch import Tensor


def mean_wins(wins_KK: Tensor) -> Tensor:
    """Mean probability of each candidate to win against the others of its prompt: ``(K,)`` from ``p(i beats j)``.

    The candidates are taken as samples of the behaviour policy, so this estimates the win probability against it.
    A comparison that is NaN is left out; a candidate without any comparison has NaN.

    Example:
        >>> mean_wins(torch.tensor([[0.5, 1.0, 0.6], [0.0, 0.5, 0.2], [0.4, 0.8, 0.5]])).tolist()
        [0.800000011920929, 0.10000000149011612, 0.6000000238418579]
    """
    others_KK = torch.isfinite(wins_KK) & ~torch.eye(len(wins_KK), dtype=torch.bool, device=wins_KK.device)
    return wins_KK.where(others_KK, 0.0).sum(1) / others_KK.sum(1)


def bradley_terry_wins(scores_PKN: Tensor, scale: float = 1.0) -> Tensor:
    """Mean win probability of each candidate among those of its prompt, from scores: ``sigmoid((s_i - s_j) / scale)``.

    Args:
        scores_PKN: scores of K candidates of P prompts; NaN where an objective has none.
        scale: the difference in score at which the better one wins 73 % of the time.

    Returns:
        wins_PKN in (0, 1); NaN where the candidate, or every other candidate of its prompt, has no score.

    Source: Bradley & Terry 1952.
    """
    difference_PKKN = (scores_PKN.unsqueeze(2) - scores_PKN.unsqueeze(1)) / scale
    other_KK1 = ~torch.eye(scores_PKN.shape[1], dtype=torch.bool, device=scores_PKN.device).unsqueeze(-1)
    # Of the scores, not of their difference: that may overflow, and then it is clear who wins.
    scored_PKN = torch.isfinite(scores_PKN)
    counted_PKKN = other_KK1 & scored_PKN.unsqueeze(2) & scored_PKN.unsqueeze(1)
    wins_PKKN = difference_PKKN.sigmoid().where(counted_PKKN, 0.0)
    return wins_PKKN.sum(2) / counted_PKKN.sum(2)


def group_softmax(logits_B: Tensor, group_B: Tensor) -> Tensor:
    """Softmax within each group; rows of a group need not be consecutive.

    Args:
        logits_B: any finite numbers, or -inf.
        group_B: int64, from 0.

    Returns:
        probabilities_B, which add to 1 in each group; 0 throughout a group whose logits are all -inf.
    """
    largest_G = group_max(logits_B, group_B)
    largest_G = largest_G.where(torch.isfinite(largest_G), 0.0)
    shifted_B = (logits_B - largest_G[group_B]).exp()
    total_G = group_sum(shifted_B, group_B).clamp(min=torch.finfo(logits_B.dtype).tiny)
    return shifted_B / total_G[group_B]


def group_logsumexp(logits_B: Tensor, group_B: Tensor) -> Tensor:
    """Logarithm of the sum of exponentials over each group, ``(G,)``; -inf where all logits are."""
    largest_G = group_max(logits_B, group_B)
    largest_G = largest_G.where(torch.isfinite(largest_G), 0.0)
    return largest_G + group_sum((logits_B - largest_G[group_B]).exp(), group_B).log()


def group_max(values_B: Tensor, group_B: Tensor) -> Tensor:
    """Largest value of each group, ``(G,)``; -inf for a group without rows. Dimensions after B are kept."""
    index = group_B.view(-1, *[1] * (values_B.ndim - 1)).expand_as(values_B)
    start_G = values_B.new_full((group_count(group_B), *values_B.shape[1:]), -torch.inf)
    return start_G.scatter_reduce(0, index, values_B, "amax")


def group_sum(values_B: Tensor, group_B: Tensor) -> Tensor:
    """Sum over each group, ``(G,)``. Dimensions after B are kept."""
    return values_B.new_zeros(group_count(group_B), *values_B.shape[1:]).index_add(0, group_B, values_B)


def group_count(group_B: Tensor) -> int:
    """Number of groups: one more than the largest index."""
    return int(group_B.max()) + 1 if len(group_B) else 0


def fill_from_group(values_BN: Tensor, group_B: Tensor) -> Tensor:
    """Values with each NaN replaced by the mean of its column over the group; 0 in a group that has none.

    So a response without a label is neutral, whatever the labels of its prompt's other responses.
    """
    present_BN = torch.isfinite(values_BN)
    totals_GN = group_sum(values_BN.where(present_BN, 0.0), group_B)
    means_GN = totals_GN / group_sum(present_BN.to(values_BN.dtype), group_B).clamp(min=1)
    return values_BN.where(present_BN, means_GN[group_B])


def fill_scores(scores_BN: Tensor, valid_BN: Tensor, group_B: Tensor) -> tuple[Tensor, Tensor]:
    """Replace missing scores by the mean of the prompt's other responses; returns them and which scores are present.

    So a response without a score is neither good nor bad. An objective without any score for a prompt is left out for
    all of the prompt's responses.

    Args:
        scores_BN: anything where it is not valid.
        valid_BN: bool.
        group_B: int64, which prompt a response belongs to.

    Returns:
        ``(filled_BN, present_BN)``.
    """
    filled_BN = fill_from_group(scores_BN.where(valid_BN, torch.nan), group_B)
    known_GN = group_sum(valid_BN.double(), group_B) > 0
    return filled_BN, known_GN[group_B] & valid_BN.any(1, keepdim=True)


def truncated_log_ratio(log_ratio_B: Tensor, group_B: Tensor, limit: float) -> tuple[Tensor, Tensor, Tensor]:
    """Truncated log importance weights of responses among those of their prompt.

    The log-ratio of a response grows with its length, and only differences within a group matter. So the group's mean
    is subtracted first, and a common drift does not cause truncation.

    Args:
        log_ratio_B: logarithm of target over sampling probability.
        group_B: int64, from 0.
        limit: largest distance from the group's mean, in nats.

    Returns:
        ``(log_weights_B, ess_B, truncated_B)``: the effective sample size ``(sum w)^2 / sum w^2`` of a row's group as a
        share of its rows, and bool, which rows were truncated.
    """
    sizes_B = torch.bincount(group_B)[group_B].to(log_ratio_B.dtype)
    centred_B = log_ratio_B - group_sum(log_ratio_B, group_B)[group_B] / sizes_B
    weights_B = centred_B.clamp(-limit, limit)
    shares_B = group_softmax(weights_B, group_B)
    ess_B = 1 / group_sum(shares_B.square(), group_B)[group_B] / sizes_B
    return weights_B, ess_B, centred_B.abs() > limit
