"""The contract of a dual step: how multipliers follow the constraints they stand for.

Legend: M constraints. The violation of one is ``v = b - G``: threshold minus value.
"""

import math
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from moa_lightning.errors import UserError
from moa_lightning.types import State


class DualUpdate(ABC):
    """New multipliers from the slack of each constraint. Subclasses are frozen dataclasses.

    What a step remembers is passed in and returned, as with combiners: tensors ``(M,)`` under names of their own.
    """

    start: float = 0.0
    """The multipliers' first value."""

    in_spreads: ClassVar[bool] = False
    """Whether slacks are in spreads of the values (standard deviations between responses), not in their own units."""

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

    def step_state(self, state: State, slack_M: Tensor) -> State:
        """Multipliers and memory after one :meth:`update`.

        Args:
            state: holds the multipliers as ``duals`` and the spreads of the values as ``spreads``.
            slack_M: in the values' own units; NaN is unknown.
        """
        duals_M, memory = self.update(state["duals"], slack_M / state["spreads"] if self.in_spreads else slack_M, state)
        return {"duals": duals_M, **memory}

    def stuck(self, duals_M: Tensor, violated_M: Tensor, batches_M: Tensor) -> Tensor:
        """For how many batches each threshold has been violated with its multiplier at its largest, this one included.

        Args:
            duals_M: multipliers.
            violated_M: bool.
            batches_M: the same count, before this batch.
        """
        return torch.where(violated_M & (duals_M >= 0.99 * self.largest), batches_M + 1, 0.0)


class Capped(DualUpdate):
    """A step whose multipliers stop at a cap."""

    cap: float

    @property
    @override
    def largest(self) -> float:
        return self.cap


def require_positive(dual: DualUpdate, **settings: float) -> None:
    """Refuse settings that are not finite numbers above 0."""
    if not all(0 < value < math.inf for value in settings.values()):
        needs = " and ".join(f"{name} > 0" for name in settings)
        given = " and ".join(map(str, settings.values()))
        raise UserError(f"{type(dual).__name__} needs {needs}, got {given}")
