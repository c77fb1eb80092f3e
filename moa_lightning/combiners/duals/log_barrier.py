"""The multipliers of a logarithmic barrier.

Legend: M constraints; the violation of one is ``v = b - G``.
"""

from dataclasses import dataclass

from torch import Tensor
from typing_extensions import override

from moa_lightning.combiners.duals.base import DualUpdate
from moa_lightning.errors import UserError
from moa_lightning.types import State


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
        if not self.sigma > 0 or not self.margin > 0 or not 0 < self.rate <= 1:
            raise UserError(
                f"LogBarrier needs sigma > 0, margin > 0 and rate in (0, 1], got {self.sigma}, {self.margin} and "
                f"{self.rate}"
            )

    @property
    def largest(self) -> float:
        """The tangent's slope."""
        return self.sigma / self.margin

    @override
    def step(self, duals_M: Tensor, slack_M: Tensor, state: State) -> tuple[Tensor, State]:
        return duals_M + self.rate * (self.sigma / slack_M.clamp(min=self.margin) - duals_M), {}
