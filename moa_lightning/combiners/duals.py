"""How multipliers follow the constraints they stand for.

Legend: M constraints.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor


class DualUpdate(ABC):
    """New multipliers from the slack of each constraint. Subclasses are frozen dataclasses."""

    @property
    @abstractmethod
    def largest(self) -> float:
        """The multiplier of a threshold that stays violated."""

    @abstractmethod
    def __call__(self, duals_M: Tensor, slack_M: Tensor) -> Tensor:
        """Multipliers after one step.

        Args:
            duals_M: present multipliers, at least 0.
            slack_M: ``G - b``: how far each constrained value lies above its threshold (below 0: violated).
        """


@dataclass(frozen=True)
class Lagrangian(DualUpdate):
    """Projected gradient descent on the dual: ``lambda <- min([lambda - lr (G - b)]+, cap)``. Plain, without momentum.

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
        if not self.lr > 0 or not self.cap > 0:
            raise ValueError(f"Lagrangian needs lr > 0 and cap > 0, got {self.lr} and {self.cap}")

    @property
    def largest(self) -> float:
        """The cap."""
        return self.cap

    def __call__(self, duals_M: Tensor, slack_M: Tensor) -> Tensor:
        """One projected step."""
        return (duals_M - self.lr * slack_M).clamp(0.0, self.cap)


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

    def __call__(self, duals_M: Tensor, slack_M: Tensor) -> Tensor:
        """One damped step."""
        return duals_M + self.rate * (self.sigma / slack_M.clamp(min=self.margin) - duals_M)
