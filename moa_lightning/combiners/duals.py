"""How multipliers follow the constraints they stand for.

Legend: M constraints. The violation of one is ``v = b - G``: threshold minus value.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from moa_lightning.types import State


class DualUpdate(ABC):
    """New multipliers from the slack of each constraint. Subclasses are frozen dataclasses.

    What a step remembers is passed in and returned, as with combiners: tensors ``(M,)`` under names of their own.
    """

    start: float = 0.0
    """The multipliers' first value."""

    @property
    @abstractmethod
    def largest(self) -> float:
        """The multiplier of a threshold that stays violated."""

    def init(self, count: int) -> State:
        """First memory, for so many constraints."""
        return {}

    @abstractmethod
    def step(self, duals_M: Tensor, slack_M: Tensor, state: State) -> tuple[Tensor, State]:
        """Multipliers after one step, and what the step remembers.

        Args:
            duals_M: present multipliers, at least 0.
            slack_M: ``G - b``: how far each constrained value lies above its threshold (below 0: violated). Finite.
            state: holds, among others, what :meth:`init` or the last step returned.
        """

    def update(self, duals_M: Tensor, slack_M: Tensor, state: State) -> tuple[Tensor, State]:
        """One :meth:`step` of the constraints whose slack is known; where it is NaN nothing changes."""
        known_M = slack_M.isfinite()
        new_M, memory = self.step(duals_M, slack_M.where(known_M, 0.0), state)
        return new_M.where(known_M, duals_M), {k: new.where(known_M, state[k]) for k, new in memory.items()}

    def stuck(self, duals_M: Tensor, violated_M: Tensor, batches_M: Tensor) -> Tensor:
        """For how many batches each threshold has been violated with its multiplier at its largest, this one included.

        Args:
            duals_M: multipliers.
            violated_M: bool.
            batches_M: the same count, before this batch.
        """
        return torch.where(violated_M & (duals_M >= 0.99 * self.largest), batches_M + 1, 0.0)


@dataclass(frozen=True)
class Projected(DualUpdate):
    """Projected gradient descent on the dual: ``lambda <- min([lambda + lr v]+, cap)``. Plain, without momentum.

    Source: Agnihotri et al., arXiv 2505.10892, Algorithm 1.

    Args:
        lr: step size.
        cap: largest multiplier; one that stays there belongs to a threshold that cannot be met. The default weighs a
            secondary objective ten times as much as the primary one.
    """

    lr: float = 0.05
    cap: float = 10.0

    def __post_init__(self) -> None:
        """Refuse values without meaning."""
        _positive(self, lr=self.lr, cap=self.cap)

    @property
    def largest(self) -> float:
        """The cap."""
        return self.cap

    def step(self, duals_M: Tensor, slack_M: Tensor, state: State) -> tuple[Tensor, State]:
        """One projected step."""
        return (duals_M - self.lr * slack_M).clamp(0.0, self.cap), {}


@dataclass(frozen=True)
class Optimistic(DualUpdate):
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
        """Refuse values without meaning."""
        _positive(self, lr=self.lr, cap=self.cap)

    @property
    def largest(self) -> float:
        """The cap."""
        return self.cap

    def init(self, count: int) -> State:
        """No slack before the first."""
        return {"dual_slack": torch.full((count,), torch.nan)}

    def step(self, duals_M: Tensor, slack_M: Tensor, state: State) -> tuple[Tensor, State]:
        """One extrapolated step; the first is the plain one."""
        before_M = state["dual_slack"].where(state["dual_slack"].isfinite(), slack_M)
        return (duals_M - self.lr * (2 * slack_M - before_M)).clamp(0.0, self.cap), {"dual_slack": slack_M}


@dataclass(frozen=True)
class PID(DualUpdate):
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
        """Refuse values without meaning."""
        _positive(self, ki=self.ki, cap=self.cap)
        if not (0 <= self.kp < math.inf and 0 <= self.kd < math.inf):
            raise ValueError(f"PID needs kp >= 0 and kd >= 0, got {self.kp} and {self.kd}")

    @property
    def largest(self) -> float:
        """The cap."""
        return self.cap

    def init(self, count: int) -> State:
        """No slack before the first; a sum that gives the first multipliers."""
        unknown_M = torch.full((count,), torch.nan)
        return {"dual_slack": unknown_M, "dual_sum": unknown_M.clone()}

    def step(self, duals_M: Tensor, slack_M: Tensor, state: State) -> tuple[Tensor, State]:
        """One step of the controller."""
        before_M = state["dual_slack"].where(state["dual_slack"].isfinite(), slack_M)
        sum_M = state["dual_sum"].where(state["dual_sum"].isfinite(), duals_M / self.ki)
        sum_M = (sum_M - slack_M).clamp(0.0, self.cap / self.ki)
        new_M = self.ki * sum_M - self.kp * slack_M + self.kd * (before_M - slack_M).clamp(min=0.0)
        return new_M.clamp(0.0, self.cap), {"dual_slack": slack_M, "dual_sum": sum_M}


@dataclass(frozen=True)
class Exponential(DualUpdate):
    """Gradient steps on the multiplier's logarithm: ``log lambda <- log lambda + lr lambda v``. Plain, not Adam.

    Small multipliers move slowly, large ones fast, and none becomes negative.

    Source: Dai et al., "Safe RLHF", ICLR 2024, arXiv 2310.12773, and its code. Deviation: a multiplier stays above
    ``floor``, because from 0 it would never come back.

    Args:
        lr: step size.
        start: first multiplier.
        cap: largest multiplier.
        floor: smallest one; it is what a threshold that is met anyway keeps.
    """

    lr: float = 0.1
    start: float = 1.0
    cap: float = 5.0
    floor: float = 1e-3

    def __post_init__(self) -> None:
        """Refuse values without meaning."""
        _positive(self, lr=self.lr, floor=self.floor, cap=self.cap)
        if not self.floor <= self.start <= self.cap:
            raise ValueError(
                f"Exponential needs floor <= start <= cap, got {self.floor}, {self.start} and {self.cap}; Projected "
                "starts at 0"
            )

    @property
    def largest(self) -> float:
        """The cap."""
        return self.cap

    def step(self, duals_M: Tensor, slack_M: Tensor, state: State) -> tuple[Tensor, State]:
        """One multiplicative step."""
        return (duals_M * (-self.lr * duals_M * slack_M).exp()).clamp(self.floor, self.cap), {}


@dataclass(frozen=True)
class LogBarrier(DualUpdate):
    """Multipliers of the barrier ``+ sigma sum_j log(G_j - b_j)``, approached by damped steps.

    Where the barrier is stationary each multiplier is ``sigma / (G_j - b_j)``. Nearer to the threshold than ``margin``
    and beyond it, the logarithm is continued by its tangent, so the multiplier is ``sigma / margin`` there: large,
    finite, and no jump. The solution keeps a distance from the threshold that shrinks with ``sigma``.

    Args:
        sigma: strength of the barrier.
        margin: distance from the threshold at which the tangent takes over.
        rate: share of the way to the stationary multiplier that one step goes.
    """

    sigma: float = 0.01
    margin: float = 1e-3
    rate: float = 0.05

    def __post_init__(self) -> None:
        """Refuse values without meaning."""
        if not self.sigma > 0 or not self.margin > 0 or not 0 < self.rate <= 1:
            raise ValueError(
                f"LogBarrier needs sigma > 0, margin > 0 and rate in (0, 1], got {self.sigma}, {self.margin} and "
                f"{self.rate}"
            )

    @property
    def largest(self) -> float:
        """The tangent's slope."""
        return self.sigma / self.margin

    def step(self, duals_M: Tensor, slack_M: Tensor, state: State) -> tuple[Tensor, State]:
        """One damped step."""
        return duals_M + self.rate * (self.sigma / slack_M.clamp(min=self.margin) - duals_M), {}


def _positive(dual: DualUpdate, **settings: float) -> None:
    if not all(0 < value < math.inf for value in settings.values()):
        needs = " and ".join(f"{name} > 0" for name in settings)
        given = " and ".join(map(str, settings.values()))
        raise ValueError(f"{type(dual).__name__} needs {needs}, got {given}")
