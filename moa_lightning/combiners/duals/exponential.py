"""Gradient steps on the logarithm of a multiplier.

Legend: M constraints; the violation of one is ``v = b - G``.
"""

from dataclasses import dataclass

from torch import Tensor
from typing_extensions import override

from moa_lightning.combiners.duals.base import Capped, require_positive
from moa_lightning.errors import UserError
from moa_lightning.types import State


@dataclass(frozen=True)
class Exponential(Capped):
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
        require_positive(self, lr=self.lr, floor=self.floor, cap=self.cap)
        if not self.floor <= self.start <= self.cap:
            raise UserError(
                f"Exponential needs floor <= start <= cap, got {self.floor}, {self.start} and {self.cap}; Projected "
                "starts at 0"
            )

    @override
    def step(self, duals_M: Tensor, slack_M: Tensor, state: State) -> tuple[Tensor, State]:
        return (duals_M * (-self.lr * duals_M * slack_M).exp()).clamp(self.floor, self.cap), {}
