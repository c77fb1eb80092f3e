"""The dual of a KL-regularised problem with constraints, solved to convergence over several prompts.

Legend: B responses, M constraints, G prompts.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moa_lightning.functional.preference import group_count, group_logsumexp, group_softmax, group_sum


@dataclass(frozen=True)
class DualSolution:
    """The constrained problem, solved to convergence."""

    duals: Tensor  # (M,), >= 0; far out in the direction that proves it where the problem is infeasible
    ratio: Tensor  # (B,), pi / pi_ref, mean 1 under the prior of each prompt
    values: Tensor  # (M,), E_pi of each secondary objective
    feasible: bool  # whether some policy on these responses meets all thresholds
    value: Tensor  # (), the dual function at its minimum: what the best policy's objective is


def one_shot_dual(
    primary_B: Tensor,
    secondary_BM: Tensor,
    thresholds_M: Tensor,
    beta: float,
    group_B: Tensor | None = None,
    log_prior_B: Tensor | None = None,
) -> DualSolution:
    """Solve ``max E_pi[r] - beta KL(pi | ref)`` subject to ``E_pi[g_j] >= b_j`` exactly, on finite sets of responses.

    The policy is free for each prompt, the multipliers are shared: expectations are over equally likely prompts too.
    The dual ``D(lambda) = beta mean_x log E_ref exp((r + lambda (g - b))/beta)`` is convex and smooth; it is minimised
    over ``lambda >= 0`` by Newton steps, in float64 and in units in which no ``g_j - b_j`` exceeds 1. Whether
    any policy meets all thresholds is a linear programme and is decided first.

    Args:
        primary_B: score of the primary objective.
        secondary_BM: the same for the secondary ones.
        thresholds_M: b, in the units of ``secondary_BM``.
        beta: strength of the KL regularisation, in the primary objective's unit; above 0.
        group_B: int64, which prompt a response belongs to; ``None`` is one prompt.
        log_prior_B: log-weight of a response among those to its prompt under the reference, normalised here; ``None``
            is equal weights. On samples of the reference these are the Monte Carlo estimates of its expectations.

    Returns:
        The solution, in the dtype of ``primary_B``. Where no policy meets the thresholds ``feasible`` is False, and
        the other fields belong to the policy that comes nearest: the one whose smallest slack, in the units above, is
        largest.

    Raises:
        ValueError: ``beta`` is not above 0, or the shapes do not agree.

    Source: Huang et al., "One-Shot Safety Alignment for Large Language Models via Optimal Dualization", NeurIPS 2024,
    arXiv 2405.19544, Eq. 8. Deviation: Newton steps, and prior weights.

    Example: three responses, equally likely, of which the best is the worst for the constraint.
        >>> r_B, g_BM = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([[-1.0], [1.0], [0.0]])
        >>> found = one_shot_dual(r_B.double(), g_BM.double(), torch.zeros(1).double(), beta=0.5)
        >>> round(found.duals.item(), 6), round(found.value.item(), 6)
        (0.5, 0.381691)
        >>> [round(p, 5) for p in (found.ratio / 3).tolist()]
        [0.42232, 0.42232, 0.15536]
    """
    if secondary_BM.shape != (len(primary_B), len(thresholds_M)) or not len(primary_B):
        raise ValueError(
            f"the dual needs secondary scores (B, M) for {len(primary_B)} responses, at least one, and "
            f"{len(thresholds_M)} thresholds, got {tuple(secondary_BM.shape)}"
        )
    if not 0 < beta < math.inf:
        raise ValueError(f"beta must be above 0 and finite, got {beta}")
    group_B = (
        torch.zeros_like(primary_B, dtype=torch.int64) if group_B is None else group_B.unique(return_inverse=True)[1]
    )
    log_prior_B = torch.zeros_like(primary_B).double() if log_prior_B is None else log_prior_B.double()
    log_prior_B = log_prior_B - group_logsumexp(log_prior_B, group_B)[group_B]
    tilt_B, secondary = primary_B.double() / beta, secondary_BM.double()
    excess_BM = secondary - thresholds_M.double()
    units_M = excess_BM[log_prior_B.isfinite()].abs().amax(0)
    units_M = units_M.where(units_M > 0, 1.0)
    excess_BM = excess_BM / units_M
    slack, scaled_M = _largest_slack(excess_BM, group_B, log_prior_B)
    feasible = slack >= -1e-9
    if feasible:
        scaled_M = _minimise(tilt_B + log_prior_B, excess_BM, group_B)
    else:
        scaled_M = scaled_M * (_FAR / beta)
    logits_B = tilt_B + excess_BM @ scaled_M
    totals_G = group_logsumexp(logits_B + log_prior_B, group_B)
    ratio_B = (logits_B - totals_G[group_B]).exp()
    values_M = (log_prior_B.exp() * ratio_B) @ secondary / len(totals_G)
    like = primary_B.dtype
    return DualSolution(
        (beta * scaled_M / units_M).to(like),
        ratio_B.to(like),
        values_M.to(like),
        feasible,
        (beta * totals_G.mean()).to(like),
    )


def without_prompt_effects(scores_BM: Tensor, group_B: Tensor, log_prior_B: Tensor) -> Tensor:
    """Remove each prompt's own level from the scores, but not the mean over prompts: as if all answered one prompt.

    The model of a score is its prompt's level plus the response's effect, which has the same distribution in all
    prompts. A few responses to each of many prompts are then as good as many responses to one prompt. The estimate of a
    prompt's level is its mean, shrunk towards the mean over prompts by ``B = between / (between + within / n)``. If
    prompts differ no more than by chance, the scores stay unchanged. The residuals are divided by ``sqrt(1 - B / n)``,
    which restores the variance that subtracting a mean of ``n`` responses removes.

    Args:
        scores_BM: scores, each column by itself.
        group_B: int64, from 0, which prompt a response belongs to.
        log_prior_B: log-weights of a prompt's responses; ``n`` is their effective number.

    Returns:
        ``(B, M)``; for a single prompt the scores themselves.

    Source: the one-way random effects model with moment estimates of its variances (Searle, Casella & McCulloch,
    "Variance Components", 1992, chapter 3), the shrunken level being its best linear predictor.
    """
    prior_B1 = group_softmax(log_prior_B, group_B).unsqueeze(1)
    count_G1 = 1 / group_sum(prior_B1.square(), group_B)
    means_GM = group_sum(prior_B1 * scores_BM, group_B)
    prompts, mean_M = len(means_GM), means_GM.mean(0)
    within_GM = group_sum(prior_B1 * (scores_BM - means_GM[group_B]).square(), group_B)
    within_M = (count_G1 * within_GM).sum(0) / (count_G1 - 1).sum().clamp(min=1e-9)
    between_M = (means_GM - mean_M).square().sum(0) / max(prompts - 1, 1) - (within_M / count_G1).mean(0)
    noise_GM = within_M / count_G1
    shrink_GM = between_M.clamp(min=0) / (between_M.clamp(min=0) + noise_GM).clamp(min=1e-300)
    levels_GM = mean_M + shrink_GM * (means_GM - mean_M)
    scale_GM = (1 - shrink_GM / count_G1).clamp(min=1e-6).rsqrt()
    residuals_BM = (scores_BM - levels_GM[group_B]) * scale_GM[group_B]
    return mean_M + residuals_BM - (prior_B1 * residuals_BM).sum(0) / prompts


_FAR = 1e6  # multipliers in place of infinity: the KL term is negligible in comparison


def _largest_slack(excess_BM: Tensor, group_B: Tensor, log_prior_B: Tensor) -> tuple[float, Tensor]:
    """``max_pi min_j E_pi[excess_j]`` over policies on the prior's support, and the multipliers that prove it."""
    supported_B = log_prior_B.isfinite()
    groups = group_B[supported_B].cpu().numpy()
    prompts = group_count(group_B)
    supported_BM = excess_BM[supported_B].cpu().numpy() / prompts
    count, constraints = supported_BM.shape
    if constraints == 0:
        return math.inf, excess_BM.new_zeros(0)
    from scipy.optimize import linprog
    from scipy.sparse import coo_array

    # max t  subject to  t <= E_pi[excess_j] for every j, pi on the simplex of each prompt.
    solution = linprog(
        np.r_[np.zeros(count), -1.0],
        A_ub=np.c_[-supported_BM.T, np.ones(constraints)],
        b_ub=np.zeros(constraints),
        A_eq=coo_array((np.ones(count), (groups, np.arange(count))), shape=(prompts, count + 1)),
        b_eq=np.ones(prompts),
        bounds=[(0, None)] * count + [(None, None)],
    )
    assert solution.success, solution.message
    direction = torch.as_tensor(-solution.ineqlin.marginals, dtype=excess_BM.dtype, device=excess_BM.device)
    return float(-solution.fun), direction.clamp(min=0.0)


def _minimise(start_B: Tensor, excess_BM: Tensor, group_B: Tensor) -> Tensor:
    """Minimise the dual divided by ``beta`` over ``lambda / beta`` by Newton steps; it is a log-sum-exp for any beta.

    Each step minimises the quadratic model over multipliers of at least 0. A plain Newton step that is clipped at 0
    need not descend if several multipliers end there. If the curvature has vanished, the step follows the gradient.
    """
    prompts = group_count(group_B)

    def dual(scaled_M: Tensor) -> Tensor:
        return group_logsumexp(start_B + excess_BM @ scaled_M, group_B).mean()

    def policy(scaled_M: Tensor) -> Tensor:  # and the prompt: adds to 1 over all responses
        return group_softmax(start_B + excess_BM @ scaled_M, group_B) / prompts

    def residual_of(scaled_M: Tensor, gradient_M: Tensor) -> float:
        return float((scaled_M - (scaled_M - gradient_M).clamp(min=0)).abs().max())

    scaled_M = excess_BM.new_zeros(excess_BM.shape[1])
    if len(scaled_M) == 0:
        return scaled_M
    value = dual(scaled_M)
    for _ in range(2000):
        policy_B = policy(scaled_M)
        gradient_M = policy_B @ excess_BM
        residual = residual_of(scaled_M, gradient_M)
        if residual < 1e-13:
            break
        means_GM = prompts * group_sum(policy_B.unsqueeze(1) * excess_BM, group_B)
        centred_BM = excess_BM - means_GM[group_B]
        hessian_MM = centred_BM.T @ (policy_B.unsqueeze(1) * centred_BM)
        newton_M = scaled_M - _least_on_orthant(hessian_MM, scaled_M, gradient_M)
        steps = (_descend(dual, scaled_M, value, gradient_M, d) for d in (newton_M, gradient_M / residual, gradient_M))
        found = next((step for step in steps if step is not None), None)
        if found is None:
            # The dual has no more precision here: half of the digits that its gradient has.
            last_M = (scaled_M - newton_M).clamp(min=0)
            if residual_of(last_M, policy(last_M) @ excess_BM) > residual / 2:
                break
            found = last_M, dual(last_M)
        scaled_M, value = found
    return scaled_M


def _least_on_orthant(hessian_MM: Tensor, at_M: Tensor, gradient_M: Tensor) -> Tensor:
    """Minimise the quadratic with this gradient at a point over vectors of at least 0."""
    from scipy.optimize import nnls

    curvature_M, axes_MM = torch.linalg.eigh(hessian_MM)
    # What is added keeps the step finite where an objective hardly varies any more.
    root_M = (curvature_M.clamp(min=0.0) + 1e-14 + 1e-12 * curvature_M[-1]).sqrt()
    target_M = root_M * (axes_MM.T @ at_M) - (axes_MM.T @ gradient_M) / root_M
    try:
        least, _ = nnls((root_M.unsqueeze(1) * axes_MM.T).cpu().numpy(), target_M.cpu().numpy(), maxiter=1000)
    except RuntimeError:  # not within so many steps: the gradient will have to do
        return at_M - gradient_M
    return torch.as_tensor(least, dtype=at_M.dtype, device=at_M.device)


def _descend(
    dual: Callable[[Tensor], Tensor], start_M: Tensor, value: Tensor, gradient_M: Tensor, direction_M: Tensor
) -> tuple[Tensor, Tensor] | None:
    """The first sufficient descent along the projected direction, or None."""
    # If the policy has almost collapsed, the curvature is close to 0 and a full step would be astronomic.
    size = min(1.0, float(100 * (1 + start_M.norm()) / direction_M.norm().clamp(min=1e-300)))
    for _ in range(60):
        trial_M = (start_M - size * direction_M).clamp(min=0)
        lower, promised = dual(trial_M), gradient_M @ (start_M - trial_M)
        if promised > 0 and lower < value and lower <= value - 1e-4 * promised:
            return trial_M, lower
        size /= 2
    return None
