"""MOPO's mathematics: the closed-form optimum for given multipliers, and the robust value of a constraint.

Its dual is that of :func:`one_shot_dual`, with ``tau`` for ``beta``.

Legend: B responses, N objectives.
"""

import math

import torch
from torch import Tensor

from moa_lightning.functional.preference import group_softmax


def mopo_policy(
    wins_BN: Tensor, weights_N: Tensor, tau: float, log_prior_B: Tensor, group_B: Tensor | None = None
) -> Tensor:
    """The optimal policy for given multipliers, for several prompts at once: ``prior * rho``.

    ``rho = exp((p + lambda . q) / tau) / E_prior exp((p + lambda . q) / tau)``, computed in logarithms, so that it
    cannot overflow. With equally many equally likely responses to each prompt, ``rho`` is this policy over its mean.

    Args:
        wins_BN: mean win probabilities (or any scores), finite.
        weights_N: 1 for the primary objective, its multiplier for each secondary one.
        tau: strength of the KL regularisation, in the scores' units; above 0.
        log_prior_B: log-weight of each response among those to its prompt under the reference; -inf leaves it out.
        group_B: int64, which prompt a response belongs to; ``None`` is one prompt.

    Returns:
        policy_B, which sums to 1 over the responses to each prompt; 0 in a prompt without prior weight.

    Raises:
        ValueError: ``tau`` is not above 0.

    Source: Agnihotri et al., "Multi-Objective Preference Optimization", arXiv 2505.10892. Deviation: the paper's Eq. 3
    is not normalised (it has a -1 instead); only the normalised form is a density ratio.

    Example: two responses to each of two prompts; the prior has left out the last one.
        >>> wins_BN, prior_B = torch.tensor([[1.0], [0.0], [0.3], [0.9]]), torch.tensor([0.0, 0.0, 0.0, -torch.inf])
        >>> mopo_policy(wins_BN, torch.ones(1), 1.0, prior_B, torch.tensor([0, 0, 1, 1])).tolist()
        [0.7310585975646973, 0.2689414322376251, 1.0, 0.0]
    """
    if not tau > 0:
        raise ValueError(f"tau must be above 0, got {tau}")
    group_B = torch.zeros_like(wins_BN[:, 0], dtype=torch.int64) if group_B is None else group_B
    return group_softmax((wins_BN * weights_N).sum(1) / tau + log_prior_B, group_B)


def robust_value(values_B: Tensor, radius: float, log_prior_B: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The smallest mean that any distribution within a KL ball around the prior can give these values.

    ``min_{Q: KL(Q | ref) <= eps} E_Q[v] = max_{chi > 0} -chi log E_ref exp(-v / chi) - chi eps``. The maximiser is
    where the tilted distribution ``Q ~ ref exp(-v / chi)`` has divergence eps; it is found by bisection, in float64.

    Args:
        values_B: v; for MOPO the ratio times the secondary objective.
        radius: eps, in nats, at least 0; 0 is the plain mean.
        log_prior_B: log-probabilities under the reference, normalised here; ``None`` is uniform.

    Returns:
        ``(value, chi)``, scalars in the dtype of ``values_B``. ``chi`` is infinite for radius 0 and for equal values,
        and 0 if the ball contains the distribution on the smallest values.

    Raises:
        ValueError: the radius is negative.

    Source: Agnihotri et al., arXiv 2505.10892, section on the robust constraint; Hu & Hong 2013 for the duality.
    """
    if radius < 0:
        raise ValueError(f"the radius of the KL ball must be at least 0, got {radius}")
    values, log_prior = values_B.double(), _log_prior(values_B.double(), log_prior_B)
    supported = torch.isfinite(log_prior)
    values, log_prior = values[supported], log_prior[supported]
    like, mean, lowest = values_B.dtype, log_prior.exp() @ values, values.min()
    spread = float(values.max() - lowest)
    if radius == 0 or spread == 0:
        return mean.to(like), torch.tensor(torch.inf, dtype=like, device=values_B.device)
    if radius >= -float(torch.logsumexp(log_prior[values == lowest], 0)):
        return lowest.to(like), torch.zeros((), dtype=like, device=values_B.device)
    above = (values - lowest) / spread  # in [0, 1]: the search below needs no scale

    def tilted(chi: float) -> tuple[Tensor, float]:
        scores = log_prior - above / chi
        log_tilted = scores - torch.logsumexp(scores, 0)
        return log_tilted.exp(), float(log_tilted.exp() @ (log_tilted - log_prior))

    low, high = -40.0, 40.0  # logarithms of chi
    for _ in range(200):
        middle = (low + high) / 2
        if tilted(math.exp(middle))[1] > radius:
            low = middle
        else:
            high = middle
    chi = math.exp((low + high) / 2)
    # The dual value's derivative is 0 here, so its error is of second order in that of the bisection.
    value = -chi * torch.logsumexp(log_prior - above / chi, 0) - chi * radius
    return (lowest + spread * value).to(like), torch.tensor(chi * spread, dtype=like, device=values_B.device)


def _log_prior(like_B: Tensor, log_prior_B: Tensor | None) -> Tensor:
    if log_prior_B is None:
        return torch.zeros_like(like_B).log_softmax(0)
    return log_prior_B.to(like_B.dtype).log_softmax(0)
