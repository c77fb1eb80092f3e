"""PAMA's closed form: the min-norm point of N scalars on the simplex.

Legend: B sequences, T tokens, N objectives.
"""

import torch
from torch import Tensor


def pama(advantages: Tensor, dim: int = -1, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Solve ``min_c (sum_i c_i A_i)^2`` over the simplex, in closed form, along ``dim``.

    The optimal value is the projection of 0 onto ``[min_i A_i, max_i A_i]``: 0 where the entries straddle 0, the
    smallest entry where all are positive, the largest where all are negative. The weights put all mass on the
    smallest (largest) entry in the one-signed cases and mix the two extremes in the straddling case; tied
    extremes share equally. No positive part is taken here: Noon is the caller's choice.

    Args:
        advantages: any shape, objectives along ``dim``; floating point.
        dim: the dimension of the N objectives.
        valid: bool, broadcastable to ``advantages``; False leaves an objective out of that entry's problem
            (weight 0). An entry without any valid objective scores 0 with all weights 0.

    Returns:
        ``(score, weights)``: ``advantages`` without ``dim``, and the same shape as ``advantages``.

    Raises:
        ValueError: ``advantages`` is not floating point, or has no objective along ``dim``.

    Source: He & Maghsudi, "Pareto Multi-Objective Alignment", ECML-PKDD 2025, arXiv 2508.07768, Theorem 1.
    The tie rule and the treatment of missing objectives are ours; the paper leaves both open.

    Example:
        >>> score, weights = pama(torch.tensor([-1.0, 3.0]))
        >>> score.item(), weights.tolist()
        (0.0, [0.75, 0.25])
    """
    if not advantages.is_floating_point():
        raise ValueError(f"pama needs floating-point advantages, got {advantages.dtype}; call .float() first")
    if advantages.shape[dim] == 0:
        raise ValueError("pama needs at least one objective along dim")
    if valid is None:
        present = torch.ones_like(advantages, dtype=torch.bool)
    else:
        present = valid.expand_as(advantages)
    low = advantages.masked_fill(~present, torch.inf).amin(dim, keepdim=True)
    high = advantages.masked_fill(~present, -torch.inf).amax(dim, keepdim=True)
    some = present.any(dim, keepdim=True)
    low, high = low.where(some, 0.0), high.where(some, 0.0)

    # In units of the larger extreme nothing overflows or underflows. Each share is computed for itself: one minus the
    # other would lose the smaller one, and with it the cancellation that makes the weighted sum 0.
    flat = low == high  # every entry ties: the two extremes are the same set
    straddles = (low <= 0) & (high >= 0)
    mixed = straddles & ~flat
    unit = torch.maximum(high, -low).where(mixed, 1.0)
    spread = (high / unit - low / unit).where(mixed, 1.0)
    share_of_low = torch.where(mixed, high / unit / spread, ((low > 0) | flat).to(advantages.dtype))
    share_of_high = torch.where(mixed, -low / unit / spread, ((high < 0) & ~flat).to(advantages.dtype))
    at_low = (advantages == low) & present
    at_high = (advantages == high) & present
    weights = share_of_low * at_low / at_low.sum(dim, keepdim=True).clamp(min=1)
    weights = weights + share_of_high * at_high / at_high.sum(dim, keepdim=True).clamp(min=1)
    score = torch.where(straddles, torch.zeros_like(low), torch.where(low > 0, low, high))
    return score.squeeze(dim), weights
