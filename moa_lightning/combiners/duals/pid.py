"""A controller on the violation.

Legend: M constraints; the violation of one is ``v = b - G``.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from moa_lightning.combiners.duals.base import Capped, require_positive
from moa_lightning.errors import UserError
from moa_lightning.types import State


@dataclass(frozen=True)
class PID(Capped):
    """A controller on the violation: ``lambda = [kp v + ki I + kd [v - v_before]+]+``, at most ``cap``; I sums the v.

    The proportional part acts at once and fades as the threshold is reached, which damps what the sum alone (that is
    ``Projected``) would overshoot. The noise of a batch goes straight into it: average over several.

    Source: Stooke et al., "Responsive Safety in Reinforcement Learning by PID Lagrangian Methods", ICML 2020,
    arXiv 2007.03964, Algorithm 2. Deviation: the sum stops at ``cap / ki``, so that it does not wind up.

    Args:
        kp: gain of the violation.
        ki: gain of its sum; the step size of ``Projected``.
        kd: gain of its increase; 0 is a PI controller.
        cap: largest multiplier.
    """

    kp: float = 0.1
    ki: float = 0.05
    kd: float = 0.0
    cap: float = 10.0

    def __post_init__(self) -> None:
        require_positive(self, ki=self.ki, cap=self.cap)
        if not (0 <= self.kp < math.inf and 0 <= self.kd < math.inf):
            raise UserError(f"PID needs kp >= 0 and kd >= 0, got {self.kp} and {self.kd}")

    def init(self, count: int) -> State:
        """No slack before the first; a sum that gives the first multipliers."""
        unknown_M = torch.full((count,), torch.nan)
        return {"dual_slack": unknown_M, "dual_sum": unknown_M.clone()}

    @override
    def step(self, duals_M: Tensor, slack_M: Tensor, state: State) -> tuple[Tensor, State]:
        before_M = state["dual_slack"].where(state["dual_slack"].isfinite(), slack_M)
        sum_M = state["dual_sum"].where(state["dual_sum"].isfinite(), duals_M / self.ki)
        sum_M = (sum_M - slack_M).clamp(0.0, self.cap / self.ki)
        new_M = self.ki * sum_M - self.kp * slack_M + self.kd * (before_M - slack_M).clamp(min=0.0)
        return new_M.clamp(0.0, self.cap), {"dual_slack": slack_M, "dual_sum": sum_M}
