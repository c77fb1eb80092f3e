"""Projected gradient steps.

Legend: M constraints; the violation of one is ``v = b - G``.
"""

from dataclasses import dataclass

from torch import Tensor
from typing_extensions import override

from moa_lightning.combiners.duals.base import Capped, require_positive
from moa_lightning.types import State


@dataclass(frozen=True)
class Projected(Capped):
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
        require_positive(self, lr=self.lr, cap=self.cap)

    @override
    def step(self, duals_M: Tensor, slack_M: Tensor, state: State) -> tuple[Tensor, State]:
        return (duals_M - self.lr * slack_M).clamp(0.0, self.cap), {}
