"""Rewards, objectives and the panel that scores responses under all of them.

Legend: B responses, N objectives.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch


class Reward(ABC):
    """Scores responses under one criterion; bigger is better (turn a cost's sign with ``Objective.scale: -1``).

    Subclasses are dataclasses that hold configuration; anything heavy (a model) is loaded in :meth:`setup`.
    """

    def check(self, columns: set[str]) -> None:
        """Refuse a configuration that cannot work, before any model is loaded.

        Args:
            columns: names of the data's columns.

        Raises:
            ValueError: one line that says what to write instead.
        """

    def setup(self, device: torch.device) -> None:
        """Load what the reward needs onto the device. Called once per process, before the first score."""

    @abstractmethod
    def score(self, prompts: list[str], completions: list[str], **columns: list[Any]) -> list[float | None]:
        """One number per response; None or NaN where this reward has no opinion."""
