"""Projected steps that look ahead.

Legend: M constraints; the violation of one is ``v = b - G``.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moa_lightning.combiners.duals.base import Capped, require_positive
from moa_lightning.types import State


@dataclass(frozen=True)
class Optimistic(Capped):
    """The projected step, with the violation extrapolated: ``lambda <- min([lambda + lr (2 v - v_before)]+, cap)``.

    Where policy and multipliers chase each other, plain steps circle the solution; these spiral into it.

    Source: Li et al., "Provable Last-Iterate Convergence for Multi-Objective Safe LLM Alignment via Optimistic
    Primal-Dual", 2026, arXiv 2602.22146. Deviation: optimistic in the multipliers alone; the policy's steps are the
    optimiser's.

    Args:
        lr: step size.
        cap: largest multiplier.
    """

    lr: float = 0.05
    cap: float = 10.0

    def __post_init__(self) -> None:
        require_positive(self, lr=self.lr, cap=self.cap)

    def init(self, count: int) -> State:
        """No slack before the first."""
        return {"dual_slack": torch.full((count,), torch.nan)}

    def step(self, duals_M: Tensor, slack_M: Tensor, state: State) -> tuple[Tensor, State]:
        """One extrapolated step; the first is the plain one."""
        before_M = state["dual_slack"].where(state["dual_slack"].isfinite(), slack_M)
        return (duals_M - self.lr * (2 * slack_M - before_M)).clamp(0.0, self.cap), {"dual_slack": slack_M}
