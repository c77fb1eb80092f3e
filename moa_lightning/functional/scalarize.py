"""Scalarisation: combining the N scores of a response into one by sums, minima and smooth minima.

Legend: B responses, N objectives. ``present_BN`` says which objectives take part in a response's problem; ``None`` is
all of them. Objectives of weight 0 never do. Each function of several objectives returns ``(score_B, shares_BN)``: the
shares add to 1, and are all 0, like the score, where no objective takes part.
"""

import torch
from torch import Tensor

from moa_lightning.functional.preference import group_sum

# Relative to the scores' size; a smaller spread of float32 scores is mostly rounding error.
NO_SPREAD = 1e-6


def group_standardize(scores_BN: Tensor, valid_BN: Tensor, group_B: Tensor) -> Tensor:
    """Subtract each objective's mean over the prompt's responses, and divide by their sample standard deviation.

    Args:
        scores_BN: floating point, in any unit; ignored where ``valid_BN`` is False, NaN included.
        valid_BN: bool.
        group_B: int64, from 0: which prompt a response belongs to.

    Returns:
        Values without unit; 0 where invalid, alone, or where all responses to the prompt score the same.

    Source: the first step of GDPO, Liu et al. 2026, arXiv 2601.05242. Deviation: no constant is added to the standard
    deviation, so the unit of an objective does not matter.

    Example: responses that win one objective and two, each against one that wins none. Of the plain sums, both
    standardised are 0.7071.
        >>> one, both = torch.tensor([[0.0, 0.0], [1.0, 0.0]]), torch.tensor([[0.0, 0.0], [1.0, 1.0]])
        >>> valid, prompt = torch.ones(2, 2, dtype=torch.bool), torch.tensor([0, 0])
        >>> [round(group_standardize(s, valid, prompt).sum(1)[1].item(), 4) for s in (one, both)]
        [0.7071, 1.4142]
    """
    kept_BN = scores_BN.double().where(valid_BN, 0.0)
    # In units of each column's largest score nothing overflows or underflows.
    kept_BN = kept_BN / kept_BN.abs().amax(0).clamp(min=torch.finfo(torch.float64).tiny)
    count_GN = group_sum(valid_BN.double(), group_B)
    mean_GN = group_sum(kept_BN, group_B) / count_GN.clamp(min=1)
    centred_BN = (kept_BN - mean_GN[group_B]).where(valid_BN, 0.0)
    spread_GN = (group_sum(centred_BN.square(), group_B) / (count_GN - 1).clamp(min=1)).sqrt()
    size_GN = (group_sum(kept_BN.square(), group_B) / count_GN.clamp(min=1)).sqrt()
    varies_GN = spread_GN > NO_SPREAD * size_GN
    return (centred_BN / spread_GN.where(varies_GN, torch.inf)[group_B]).to(scores_BN.dtype)


def group_centered(score_B: Tensor, counted_B: Tensor, group_B: Tensor, mean: float) -> Tensor:
    """Subtract the mean of the prompt's scores from each score. The result is 0 where a score does not count.

    Args:
        score_B: one for each response.
        counted_B: bool; the others are ignored.
        group_B: int64, from 0: which prompt a response belongs to.
        mean: subtracted instead if the prompt has no other score.

    Example:
        >>> counted = torch.tensor([True, True, True, False])
        >>> group_centered(torch.tensor([1.0, 3.0, 5.0, 9.0]), counted, torch.tensor([0, 0, 1, 1]), 2.0).tolist()
        [-1.0, 1.0, 3.0, 0.0]
    """
    count_G = group_sum(counted_B.to(score_B.dtype), group_B)
    mean_G = (group_sum(score_B.where(counted_B, 0.0), group_B) / count_G.clamp(min=1)).where(count_G > 1, mean)
    return (score_B - mean_G[group_B]).where(counted_B, 0.0)


def group_covariance(scores_BN: Tensor, signal_B: Tensor, valid_BN: Tensor, group_B: Tensor) -> tuple[Tensor, Tensor]:
    """Covariance of each objective with one signal over the responses to a prompt.

    Args:
        scores_BN: in the objectives' units; ignored where ``valid_BN`` is False.
        signal_B: the signal.
        valid_BN: bool.
        group_B: int64, from 0: which prompt a response belongs to.

    Returns:
        ``(covariance_GN, known_GN)``: the mean product of the deviations from the means, and bool, whether the prompt
        has at least two responses with this objective; without them the covariance is 0.

    Example:
        >>> scores, signal = torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([-1.0, 1.0])
        >>> valid, prompt = torch.ones(2, 2, dtype=torch.bool), torch.tensor([0, 0])
        >>> group_covariance(scores, signal, valid, prompt)[0].tolist()
        [[0.5, -0.5]]
    """
    count_GN = group_sum(valid_BN.to(scores_BN.dtype), group_B)

    def centred(values_BN: Tensor) -> Tensor:
        kept_BN = values_BN.where(valid_BN, 0.0)
        return (kept_BN - (group_sum(kept_BN, group_B) / count_GN.clamp(min=1))[group_B]).where(valid_BN, 0.0)

    products_BN = centred(scores_BN) * centred(signal_B.unsqueeze(1).expand_as(scores_BN))
    known_GN = count_GN > 1
    return (group_sum(products_BN, group_B) / count_GN.clamp(min=1)).where(known_GN, 0.0), known_GN


def weighted_sum(scores_BN: Tensor, weights_N: Tensor, present_BN: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``sum_i w_i s_i``; an objective that takes no part adds 0, and the other weights are not rescaled."""
    shares_BN = _taking_part(scores_BN, weights_N, present_BN) * weights_N
    score_B = (scores_BN.where(shares_BN > 0, 0.0) * shares_BN).sum(1)
    return score_B, _normalized(shares_BN)


def tchebycheff(
    scores_BN: Tensor, ideal_N: Tensor, weights_N: Tensor, present_BN: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``min_i w_i (s_i - z_i)``: the weighted distance of the objective that is furthest from the ideal point.

    Objectives tied at the minimum share equally.

    Args:
        scores_BN: in the objectives' units.
        ideal_N: z, in the same units.
        weights_N: at least 0, in inverse units.
        present_BN: bool.

    Source: Miettinen, "Nonlinear Multiobjective Optimization", 1999, section 3.4, with the sign flipped.

    Example:
        >>> tchebycheff(torch.tensor([[0.5, 0.2]]), torch.tensor([1.0, 1.0]), torch.tensor([0.5, 0.5]))[0].item()
        -0.4000000059604645
    """
    taking_BN = _taking_part(scores_BN, weights_N, present_BN)
    terms_BN = (weights_N * (scores_BN - ideal_N)).masked_fill(~taking_BN, torch.inf)
    score_B = terms_BN.amin(1)
    at_least_BN = (terms_BN == score_B.unsqueeze(1)) & taking_BN
    return score_B.where(taking_BN.any(1), 0.0), _normalized(at_least_BN.to(scores_BN.dtype))


def smooth_tchebycheff(
    scores_BN: Tensor, ideal_N: Tensor, weights_N: Tensor, mu: float, present_BN: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``-mu log sum_i exp(w_i (z_i - s_i) / mu)``: below :func:`tchebycheff`, by at most ``mu log N``.

    Args:
        scores_BN: in the objectives' units.
        ideal_N: z, in the same units.
        weights_N: at least 0, in inverse units.
        mu: smoothing, above 0; distances within about this of the largest one have an effect.
        present_BN: bool.

    Source: Lin et al. 2024, "Smooth Tchebycheff Scalarization for Multi-Objective Optimization", arXiv 2402.19078.

    Example:
        >>> one, z, w = torch.tensor([[0.5, 0.2]]), torch.tensor([1.0, 1.0]), torch.tensor([0.5, 0.5])
        >>> round(smooth_tchebycheff(one, z, w, 0.1)[0].item(), 6)
        -0.420141
    """
    taking_BN = _taking_part(scores_BN, weights_N, present_BN)
    distances_BN = (weights_N * (ideal_N - scores_BN)).masked_fill(~taking_BN, -torch.inf)
    largest_B1 = distances_BN.amax(1, keepdim=True)
    largest_B1 = largest_B1.where(largest_B1.isfinite(), 0.0)
    powers_BN = ((distances_BN - largest_B1) / mu).exp()  # the difference first: neither can then overflow to infinity
    total_B = powers_BN.sum(1)
    score_B = -largest_B1.squeeze(1) - mu * total_B.clamp(min=1.0).log()
    return score_B.where(taking_BN.any(1), 0.0), _normalized(powers_BN)


def soft_minimum(
    scores_BN: Tensor, weights_N: Tensor, k: float, present_BN: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``-(1/k) log sum_i w_i exp(-k s_i)``: the weighted mean where k is small, the minimum where it is large.

    Args:
        scores_BN: on one common scale.
        weights_N: at least 0; divided by the sum of those that take part.
        k: above 0, in inverse units of the scores.
        present_BN: bool.

    Source: RVPO, Montero et al. 2026, arXiv 2605.05750, where the weights are equal.

    Example:
        >>> round(soft_minimum(torch.tensor([[1.0, -2.0, 0.5]]).double(), torch.ones(3).double(), 1.0)[0].item(), 6)
        -1.025261
    """
    taking_BN = _taking_part(scores_BN, weights_N, present_BN)
    weights_BN = _normalized(taking_BN * weights_N)
    smallest_B1 = scores_BN.masked_fill(~taking_BN, torch.inf).amin(1, keepdim=True)
    smallest_B1 = smallest_B1.where(smallest_B1.isfinite(), 0.0)
    above_BN = k * (scores_BN.where(taking_BN, smallest_B1) - smallest_B1)
    # exp - 1 and log(1 + x) stay precise for tiny k, where the sum is close to 1.
    score_B = smallest_B1.squeeze(1) - torch.log1p((weights_BN * torch.expm1(-above_BN)).sum(1)) / k
    return score_B.where(taking_BN.any(1), 0.0), _normalized(weights_BN * torch.exp(-above_BN))


def _taking_part(scores_BN: Tensor, weights_N: Tensor, present_BN: Tensor | None) -> Tensor:
    weighted_BN = (weights_N > 0).expand_as(scores_BN)
    return weighted_BN if present_BN is None else weighted_BN & present_BN


def _normalized(shares_BN: Tensor) -> Tensor:
    total_B1 = shares_BN.sum(1, keepdim=True)
    return shares_BN / total_B1.where(total_B1 > 0, 1.0)
