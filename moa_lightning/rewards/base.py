"""Rewards and objectives: what the policy is aligned to.

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

Cut = Callable[[nn.Module], Callable[[nn.Module], AbstractContextManager[bool]]]
"""Cuts a model that only answers into pieces over the processes, in place. What it returns, called with the model, must
surround its forward passes; where that yields True, processes must run the same number of them."""


class Reward(ABC):
    """Scores responses under one criterion; bigger is better (turn a cost's sign with ``Objective.scale: -1``).

    Subclasses are dataclasses that hold configuration; anything heavy (a model) is loaded in :meth:`setup`.
    """

    gives_wins: ClassVar[bool] = False  # the score is a mean win probability among the responses to a prompt already
    of_data_alone: ClassVar[bool] = False  # knows the responses of the data, not new ones

    @property
    def title(self) -> str:
        """What messages call this reward."""
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
            UserError: one line that says what to write instead.
        """

    def setup(self, device: torch.device) -> None:
        """Load what the reward needs onto the device, before the first score.

        May be called again, with the same device or another one.
        """

    def shard(self, cut: Cut) -> None:
        """Called before :meth:`setup` where processes hold models in pieces: load the reward's model and cut it.

        All processes call :meth:`score` equally often, with different numbers of responses. Nothing to do for rewards
        without a model; a model that is left whole takes its memory on every process.
        """

    @abstractmethod
    def score(self, prompts: list[str], completions: list[str], **columns: list[Any]) -> list[float | None]:
        """One number per response; None or NaN where this reward has no opinion."""


@dataclass(frozen=True)
class Objective:
    """One reward and its place in the panel: the value is ``clip(scale * raw + shift)``.

    The value is what trains, what thresholds are written in, and what fronts and comparisons are made of. Where it
    differs from the raw score, logs, tables and files show the raw score beside it.

    Args:
        reward: what is scored.
        weight: of this objective where a combiner has no weights of its own (linear scalarisation); >= 0. A number, or
            a schedule by ``class_path``: ``LinearWeight``, ``PiecewiseWeight``.
        scale: factor of the raw score; ``-1`` turns a cost into a reward.
        shift: added after scaling.
        clip: lowest and highest value, after scaling and shifting; ``None`` does not clip.
        eval_only: score and log it, but keep it out of the training.
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
        """How the value follows from the raw score, in words; empty where they are the same."""
        return transform_in_words(self.scale, self.shift, self.clip)

    def value(self, raw_B: Tensor) -> Tensor:
        """``clip(scale * raw + shift)``; NaN stays NaN."""
        value_B = self.scale * raw_B + self.shift
        return value_B if self.clip is None else value_B.clamp(*self.clip)


def check_transform(scale: float, shift: float, clip: Sequence[float] | None, of: str = "an objective's ") -> None:
    """Validate what turns an objective's raw score into its value.

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
    """How an objective's value follows from its raw score; empty where they are the same.

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
