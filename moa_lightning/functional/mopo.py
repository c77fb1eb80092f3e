"""MOPO's mathematics: the closed-form ratio, its dual, and the robust value of a constraint.

Legend: B responses, M secondary objectives.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linprog
from torch import Tensor


@dataclass(frozen=True)
class DualSolution:
    """The constrained problem, solved to convergence."""

    duals: Tensor  # (M,), >= 0; the last iterate where the problem is infeasible
    ratio: Tensor  # (B,), pi / pi_ref, mean 1 under the prior
    values: Tensor  # (M,), E_pi of each secondary objective
    feasible: bool  # whether some policy on these responses meets all thresholds


def mopo_ratio(
    primary_B: Tensor, secondary_BM: Tensor, duals_M: Tensor, tau: float, log_prior_B: Tensor | None = None
) -> Tensor:
    """The optimal density ratio for given multipliers: a softmax of ``(p + lambda q) / tau`` under the prior.

    Args:
        primary_B: mean win probability (or any score) of the primary objective.
        secondary_BM: the same for the secondary ones.
        duals_M: multipliers.
        tau: strength of the KL regularisation, in the scores' units; above 0.
        log_prior_B: log-probabilities of the responses under the reference, normalised here; ``None`` is uniform.

    Returns:
        ratio_B, whose mean under the prior is 1. Computed in logarithms throughout, so it cannot overflow.

    Raises:
        ValueError: ``tau`` is not above 0.

    Source: Agnihotri et al., "Multi-Objective Preference Optimization", arXiv 2505.10892. Deviation: the paper's
    Eq. 3 is not normalised (it has a -1 instead); only the normalised form is a density ratio.
    """
    if not tau > 0:
        raise ValueError(f"tau must be above 0, got {tau}")
    log_prior_B = _log_prior(primary_B, log_prior_B)
    scores_B = (primary_B + secondary_BM @ duals_M.to(primary_B.dtype)) / tau
    return (scores_B - torch.logsumexp(scores_B + log_prior_B, 0)).exp()


def mopo_dual(
    primary_B: Tensor, secondary_BM: Tensor, thresholds_M: Tensor, tau: float, log_prior_B: Tensor | None = None
) -> DualSolution:
    """Solve ``max E_pi[p] - tau KL(pi | ref)`` subject to ``E_pi[q_j] >= b_j`` exactly, on one finite response set.

    The dual ``g(lambda) = tau log E_ref exp((p + lambda q)/tau) - lambda b`` is convex and smooth; it is minimised
    over ``lambda >= 0`` by projected Newton steps, in float64. Whether any policy meets all
    thresholds is a linear programme and is decided first.

    Args:
        primary_B: mean win probability (or any score) of the primary objective.
        secondary_BM: the same for the secondary ones.
        thresholds_M: b, in the units of ``secondary_BM``.
        tau: strength of the KL regularisation, in the scores' units; above 0.
        log_prior_B: log-probabilities of the responses under the reference, normalised here; ``None`` is uniform.

    Returns:
        The solution, in the dtype of ``primary_B``. Where no policy meets the thresholds ``feasible`` is False, and
        the other fields belong to the policy that comes nearest: the one with the largest smallest slack.

    Raises:
        ValueError: ``tau`` is not above 0, or the shapes do not agree.

    Source: Agnihotri et al., arXiv 2505.10892, the dual of its Eq. 2; see also arXiv 2405.19544, Eq. 8.
    """
    if secondary_BM.shape != (len(primary_B), len(thresholds_M)):
        raise ValueError(
            f"mopo_dual needs secondary scores (B, M) for {len(primary_B)} responses and {len(thresholds_M)} "
            f"thresholds, got {tuple(secondary_BM.shape)}"
        )
    primary, secondary, thresholds = primary_B.double(), secondary_BM.double(), thresholds_M.double()
    log_prior = _log_prior(primary, log_prior_B)
    slack, direction = _largest_slack(secondary - thresholds, log_prior)
    feasible = slack >= -1e-9
    duals = torch.zeros_like(thresholds) if feasible else direction * _FAR
    if feasible:
        duals = _minimise_dual(primary, secondary, thresholds, tau, log_prior)
    ratio = mopo_ratio(primary, secondary, duals, tau, log_prior)
    values = (log_prior.exp() * ratio) @ secondary
    like = primary_B.dtype
    return DualSolution(duals.to(like), ratio.to(like), values.to(like), feasible)


_FAR = 1e6  # multipliers that stand for infinity: the KL term no longer matters beside them


def _largest_slack(excess_BM: Tensor, log_prior_B: Tensor) -> tuple[float, Tensor]:
    """``max_pi min_j E_pi[excess_j]`` over policies on the prior's support, and the multipliers that prove it."""
    supported_BM = excess_BM[torch.isfinite(log_prior_B)].cpu().numpy()
    count, constraints = supported_BM.shape
    if constraints == 0:
        return math.inf, excess_BM.new_zeros(0)
    # max t  subject to  t <= E_pi[excess_j] for every j, pi on the simplex.
    solution = linprog(
        np.r_[np.zeros(count), -1.0],
        A_ub=np.c_[-supported_BM.T, np.ones(constraints)],
        b_ub=np.zeros(constraints),
        A_eq=np.r_[np.ones(count), 0.0][None],
        b_eq=[1.0],
        bounds=[(0, None)] * count + [(None, None)],
    )
    assert solution.success, solution.message
    direction = torch.as_tensor(-solution.ineqlin.marginals, dtype=excess_BM.dtype, device=excess_BM.device)
    return float(-solution.fun), direction


def _minimise_dual(
    primary_B: Tensor, secondary_BM: Tensor, thresholds_M: Tensor, tau: float, log_prior_B: Tensor
) -> Tensor:
    """Projected Newton steps on the dual over ``tau``, in ``lambda / tau``: log-sum-exp, whatever tau is.

    A multiplier next to 0 that the gradient drives towards 0 takes no part in the Newton system (Bertsekas 1982): in it
    the projected step would be no descent. Where the curvature has vanished the gradient alone goes on.
    """
    excess_BM, start_B = secondary_BM - thresholds_M, primary_B / tau + log_prior_B

    def dual(scaled_M: Tensor) -> Tensor:
        return torch.logsumexp(start_B + excess_BM @ scaled_M, 0)

    scaled_M = torch.zeros_like(thresholds_M)
    if len(scaled_M) == 0:
        return scaled_M
    value = dual(scaled_M)
    for _ in range(2000):
        policy_B = (start_B + excess_BM @ scaled_M).softmax(0)
        gradient_M = policy_B @ excess_BM
        residual = float((scaled_M - (scaled_M - gradient_M).clamp(min=0)).abs().max())
        if residual < 1e-13:
            break
        free_M = (scaled_M > min(residual, 1e-3)) | (gradient_M <= 0)
        centred_BM = excess_BM - gradient_M
        hessian_MM = centred_BM.T @ (policy_B.unsqueeze(1) * centred_BM)
        # The ridge keeps the step finite where an objective hardly varies any more.
        ridge = 1e-14 + 1e-12 * hessian_MM.diagonal().max()
        hessian = hessian_MM[free_M][:, free_M] + ridge * torch.eye(int(free_M.sum())).to(hessian_MM)
        newton_M = gradient_M.clone()
        newton_M[free_M] = torch.linalg.solve(hessian, gradient_M[free_M])
        steps = (_descend(dual, scaled_M, value, gradient_M, d) for d in (newton_M, gradient_M / residual, gradient_M))
        found = next((step for step in steps if step is not None), None)
        if found is None:
            # The dual's own digits are used up, at half of those that its gradient has.
            last_M = (scaled_M - newton_M).clamp(min=0)
            slope_M = (start_B + excess_BM @ last_M).softmax(0) @ excess_BM
            if float((last_M - (last_M - slope_M).clamp(min=0)).abs().max()) > residual / 2:
                break
            found = last_M, dual(last_M)
        scaled_M, value = found
    return tau * scaled_M


def _descend(
    dual: Callable[[Tensor], Tensor], start_M: Tensor, value: Tensor, gradient_M: Tensor, direction_M: Tensor
) -> tuple[Tensor, Tensor] | None:
    """The first sufficient descent along the projected direction, or None."""
    # Where the policy has all but collapsed the curvature is next to 0 and a whole step would be astronomic.
    size = min(1.0, float(100 * (1 + start_M.norm()) / direction_M.norm().clamp(min=1e-300)))
    for _ in range(60):
        trial_M = (start_M - size * direction_M).clamp(min=0)
        lower, promised = dual(trial_M), gradient_M @ (start_M - trial_M)
        if promised > 0 and lower < value and lower <= value - 1e-4 * promised:
            return trial_M, lower
        size /= 2
    return None


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
        and 0 where the ball reaches the distribution that sits on the smallest values.

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
    # The dual value's derivative is 0 here, so it is exact to second order in what is left of the bisection.
    value = -chi * torch.logsumexp(log_prior - above / chi, 0) - chi * radius
    return (lowest + spread * value).to(like), torch.tensor(chi * spread, dtype=like, device=values_B.device)


def _log_prior(like_B: Tensor, log_prior_B: Tensor | None) -> Tensor:
    if log_prior_B is None:
        return torch.zeros_like(like_B).log_softmax(0)
    return log_prior_B.to(like_B.dtype).log_softmax(0)
