"""Rewards and objectives that the policy is aligned to.

Legend: B responses.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from moa_lightning.errors import UserError
from moa_lightning.schedules import Weight, check_weights, weight_at

ShardModel = Callable[[nn.Module], Callable[[nn.Module], AbstractContextManager[bool]]]
"""Shards a frozen model over the processes, in place. It returns a function that, called with the model, gives the
context manager for its forward passes. If that yields True, all processes must run equally many forward passes."""


class Reward(ABC):
    """Scores responses by one criterion; higher is better (flip the sign of a cost with ``Objective.scale: -1``).

    Subclasses are dataclasses that hold configuration; anything heavy (a model) is loaded in :meth:`setup`.
    """

    gives_wins: ClassVar[bool] = False  # whether scores are mean win probabilities among the responses to a prompt
    of_data_alone: ClassVar[bool] = False  # whether it can score only the data's responses, not new ones

    @property
    def title(self) -> str:
        """Name of this reward in messages."""
        return type(self).__name__

    @property
    def fixed_rivals(self) -> bool:
        """Whether the score is a win probability against responses that stay the same while the policy moves."""
        return False

    def check(self, columns: set[str]) -> None:
        """Refuse a configuration that cannot work, before any model is loaded.

        Args:
            columns: names of the data's columns.

        Raises:
            UserError: one line that says how to correct it.
        """

    def setup(self, device: torch.device) -> None:
        """Load what the reward needs onto the device, before the first call of :meth:`score`.

        It may be called again, with the same device or another one.
        """

    def shard(self, shard_model: ShardModel) -> None:
        """Load the reward's model and shard it. Called before :meth:`setup` if the strategy shards models.

        All processes call :meth:`score` equally often, with different numbers of responses. The default does nothing: a
        model that is not sharded takes its full memory on every process.
        """

    @abstractmethod
    def score(self, prompts: list[str], completions: list[str], **columns: list[Any]) -> list[float | None]:
        """Score responses: one number each, or None or NaN to skip a response."""


@dataclass(frozen=True)
class Objective:
    """One reward and its place in the panel: the value is ``clip(scale * raw + shift)``.

    Training, thresholds, fronts and comparisons use the value. Where it differs from the raw score, logs, tables and
    files show the raw score too.

    Args:
        reward: computes the raw score.
        weight: of this objective, for combiners that have no weights of their own; >= 0. A number, or a schedule by
            ``class_path``: ``LinearWeight``, ``PiecewiseWeight``.
        scale: factor of the raw score; ``-1`` turns a cost into a reward.
        shift: added after scaling.
        clip: lowest and highest value, after scaling and shifting; ``None`` does not clip.
        eval_only: score and log it, but do not train on it.
    """

    reward: Reward
    weight: Weight = 1.0
    scale: float = 1.0
    shift: float = 0.0
    clip: tuple[float, float] | None = None
    eval_only: bool = False

    def __post_init__(self) -> None:
        """Validate hyperparameters."""
        check_weights({"an objective's weight": weight_at(self.weight, 0.0)})
        check_transform(self.scale, self.shift, self.clip)
        if self.reward.gives_wins and not all(0 <= bound <= 1 for bound in (self.shift, self.scale + self.shift)):
            raise UserError(
                f"{self.reward.title} gives win probabilities, which scale {self.scale:g} and shift {self.shift:g} "
                "take out of [0, 1]; remove them, or turn the objective around with scale -1 and shift 1"
            )

    @property
    def transform(self) -> str:
        """Formula of the value in terms of the raw score, for messages; empty if they are equal."""
        return transform_in_words(self.scale, self.shift, self.clip)

    def value(self, raw_B: Tensor) -> Tensor:
        """``clip(scale * raw + shift)``; NaN stays NaN."""
        value_B = self.scale * raw_B + self.shift
        return value_B if self.clip is None else value_B.clamp(*self.clip)


def check_transform(scale: float, shift: float, clip: Sequence[float] | None, of: str = "an objective's ") -> None:
    """Validate the transform from an objective's raw score to its value.

    Args:
        scale: factor of the raw score.
        shift: added after scaling.
        clip: lowest and highest value.
        of: whose they are, for the message.

    Raises:
        UserError: one line with the number.
    """
    if not math.isfinite(scale) or scale == 0:
        raise UserError(f"{of}scale must be a finite number other than 0, got {scale}")
    if not math.isfinite(shift):
        raise UserError(f"{of}shift must be a finite number, got {shift}")
    # Written so that NaN is refused too.
    if clip is not None and not clip[0] < clip[1]:
        raise UserError(f"{of}clip must be [low, high] with low < high, got {list(clip)}")


def transform_in_words(scale: float, shift: float, clip: Sequence[float] | None) -> str:
    """Formula of an objective's value in terms of its raw score; empty if they are equal.

    Example:
        >>> transform_in_words(-1.0, 2.0, [0.0, 1.0])
        '-1 x raw + 2, clipped to [0, 1]'
        >>> transform_in_words(1.0, 0.0, None)
        ''
    """
    product = "raw" if scale == 1 else f"{scale:g} x raw"
    total = product if shift == 0 else f"{product} {'-' if shift < 0 else '+'} {abs(shift):g}"
    if clip is not None:
        return f"{total}, clipped to [{clip[0]:g}, {clip[1]:g}]"
    return "" if total == "raw" else total
