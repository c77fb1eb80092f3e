"""Rewards that need only the text."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

import torch
from typing_extensions import override

from moa_lightning.errors import UserError
from moa_lightning.rewards.base import Reward
from moa_lightning.utils.pretrained import open_tokenizer


class LengthUnit(ABC):
    """The unit in which the length of a text is counted."""

    def check(self) -> None:
        """Refuse a configuration that cannot work."""

    @abstractmethod
    def count(self, texts: list[str]) -> list[int]:
        """The length of each text."""


@dataclass(frozen=True)
class Words(LengthUnit):
    """Words, separated by white space."""

    @override
    def count(self, texts: list[str]) -> list[int]:
        return [len(text.split()) for text in texts]


@dataclass(frozen=True)
class Characters(LengthUnit):
    """Unicode characters, including white space."""

    @override
    def count(self, texts: list[str]) -> list[int]:
        return [len(text) for text in texts]


@dataclass
class Tokens(LengthUnit):
    """Tokens of a tokenizer, without special tokens.

    Args:
        path: folder or hub id of the tokenizer; for the policy's own tokens, the policy's path.
        trust_remote_code: run code that comes with the tokenizer.
    """

    path: str
    trust_remote_code: bool = False
    _tokenizer: Any = field(default=None, init=False, repr=False, compare=False)

    def check(self) -> None:
        """Load the tokenizer."""
        if self._tokenizer is None:
            self._tokenizer = open_tokenizer(self.path, trust_remote_code=self.trust_remote_code)

    @override
    def count(self, texts: list[str]) -> list[int]:
        self.check()
        if not texts:  # tokenizers refuse an empty batch
            return []
        return [len(ids) for ids in self._tokenizer(texts, add_special_tokens=False)["input_ids"]]


@dataclass
class Length(Reward):
    """Length of the completion: ``clip(l / divisor, low, high)``.

    ``Length()`` is that of PAMA's IMDb experiment, ``clip(l/140, 70/140, 210/140)``: 0.5 at 70 and below, 1.5 at 210
    and above. That of its HH-RLHF experiment, ``clip(l/140, 0, 4096/140)``, is ``Length(low=0, high=29.257)``.

    Source: He & Maghsudi, ECML-PKDD 2025, arXiv 2508.07768. The paper does not specify the unit of ``l``; the default
    here is words.

    Args:
        divisor: length that scores 1, in the unit.
        low: lowest score, after the division; ``null`` for none.
        high: highest score, after the division; ``null`` for none.
        unit: ``Words``, ``Characters``, or ``Tokens`` with the ``path`` of a tokenizer.
    """

    divisor: float = 140.0
    low: float | None = 0.5
    high: float | None = 1.5
    unit: LengthUnit = field(default_factory=Words)

    def __post_init__(self) -> None:
        """Validate hyperparameters."""
        if not (math.isfinite(self.divisor) and self.divisor > 0):
            raise UserError(f"Length.divisor must be a finite number above 0, got {self.divisor}")
        self._low = -math.inf if self.low is None else self.low
        self._high = math.inf if self.high is None else self.high
        if not self._low < self._high:
            raise UserError(f"Length.low must be below Length.high, got {self.low} and {self.high}")

    def check(self, columns: set[str]) -> None:
        """Load the unit's tokenizer, if it has one."""
        self.unit.check()

    def setup(self, device: torch.device) -> None:
        """Load the unit's tokenizer, if :meth:`check` was not called."""
        self.unit.check()

    def score(self, prompts: list[str], completions: list[str], **columns: list[Any]) -> list[float | None]:
        """Score completions. Every one has a score, even an empty one."""
        return [min(max(length / self.divisor, self._low), self._high) for length in self.unit.count(completions)]
