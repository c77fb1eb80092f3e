"""A controller on a multiplier's logarithm.

Legend: M constraints; the violation of one is ``v = b - G``, here in spreads of its value.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from moa_lightning.combiners.duals.base import Capped, require_positive
from moa_lightning.errors import UserError
from moa_lightning.types import State


@dataclass(frozen=True)
class LogPID(Capped):
    """A controller on the multiplier's logarithm: ``log lambda = kp v + ki I + kd D``, from ``floor`` to ``cap``.

    ``v`` is the violation in spreads of the value (standard deviations between responses), so the gains suit rewards
    of any unit. ``I`` sums the ``v``. ``D`` is the change of ``v`` from batch to batch, averaged.

    Why it settles: where two objectives trade one for one, no multiplier holds a mean in place. A fixed one moves it at
    constant speed, up or down, so a step that only sums violations swings past the threshold, again and again. The
    proportional part brakes on the way there, as the quadratic term of an augmented Lagrangian does. ``D`` makes up for
    the optimiser's momentum, and ``I`` finds the multiplier that holds.

    Source: Stooke et al., "Responsive Safety in Reinforcement Learning by PID Lagrangian Methods", ICML 2020,
    arXiv 2007.03964, Algorithm 2. Deviations: on the logarithm, so that a factor up weighs as much as the same factor
    down; in spreads; with a ``margin``; ``D`` has either sign and is averaged; the sum stands still while the
    multiplier is at a bound.

    Args:
        kp: gain of the violation: one spread below the threshold multiplies by ``exp(kp)``.
        ki: gain of its sum.
        kd: gain of its change from one batch to the next.
        margin: how far above its threshold a value is aimed at, in spreads: what a run ends with lies to both sides of
            what it is aimed at.
        smoothing: share that the average of changes keeps at each batch; 0 takes the last change alone.
        start: first multiplier, and the one that the sum starts from.
        cap: largest multiplier.
        floor: smallest one; it is what a threshold that is met anyway keeps.
    """

    kp: float = 1.5
    ki: float = 0.03
    kd: float = 5.0
    margin: float = 0.08
    smoothing: float = 0.8
    start: float = 1.0
    cap: float = 5.0
    floor: float = 0.01

    in_spreads: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_positive(self, ki=self.ki, floor=self.floor, cap=self.cap)
        if not (0 <= self.kp < math.inf and 0 <= self.kd < math.inf):
            raise UserError(f"LogPID needs kp >= 0 and kd >= 0, got {self.kp} and {self.kd}")
        if not 0 <= self.margin < math.inf:
            raise UserError(f"LogPID needs margin >= 0, got {self.margin}")
        if not 0 <= self.smoothing < 1:
            raise UserError(f"LogPID needs smoothing in [0, 1), got {self.smoothing}")
        if not self.floor <= self.start <= self.cap:
            raise UserError(f"LogPID needs floor <= start <= cap, got {self.floor}, {self.start} and {self.cap}")

    def init(self, count: int) -> State:
        """No slack before the first; a sum that gives the first multipliers."""
        unknown_M = torch.full((count,), torch.nan)
        # Under names of its own: PID's memory is in other units, and must not be taken for this one's on resume.
        return {"log_pid_slack": unknown_M, "log_pid_sum": unknown_M.clone(), "log_pid_change": torch.zeros(count)}

    @override
    def step(self, duals_M: Tensor, slack_M: Tensor, state: State) -> tuple[Tensor, State]:
        low, high = math.log(self.floor), math.log(self.cap)
        slack_M = slack_M - self.margin
        before_M = state["log_pid_slack"].where(state["log_pid_slack"].isfinite(), slack_M)
        change_M = self.smoothing * state["log_pid_change"] + (1 - self.smoothing) * (before_M - slack_M)
        # The sum is kept as ki I, in units of log lambda.
        sum_M = state["log_pid_sum"].where(state["log_pid_sum"].isfinite(), duals_M.clamp(min=self.floor).log())
        steady_M = sum_M - (self.ki + self.kp) * slack_M
        at_bound_M = ((steady_M > high) & (slack_M < 0)) | ((steady_M < low) & (slack_M > 0))
        sum_M = (sum_M - self.ki * slack_M).where(~at_bound_M, sum_M).clamp(low, high)
        log_M = (sum_M - self.kp * slack_M + self.kd * change_M).clamp(low, high)
        memory = {"log_pid_slack": slack_M, "log_pid_sum": sum_M, "log_pid_change": change_M}
        return log_M.exp(), memory
