"""Preference models, which compare two responses to a prompt."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from typing_extensions import override

from moa_lightning.errors import UserError
from moa_lightning.rewards.base import Reward
from moa_lightning.rewards.function import FunctionReward


@dataclass
class PairwisePreference(Reward):
    """A function that compares two responses to a prompt; the score is the mean probability to win.

    ``f(prompts, completions, **columns) -> list[float | None]`` gets pairs ``[first, second]`` as completions and
    returns the probability that the first one wins. It may query a model or people. Each response is compared with
    every other response to the same prompt, in one order only, or with the text of a column.

    A response without another one to compare with has no score. So without ``baseline``, evaluations with one response
    per prompt have no scores for this objective.

    Args:
        function: dotted path, such as ``judges.prefer`` for ``def prefer`` in ``judges.py``; in Python, the function
            itself.
        baseline: name of a column with a response to each prompt that the others are compared with; ``None`` compares
            them among themselves.
    """

    function: str | Callable[..., Any]
    baseline: str | None = None
    _judge: FunctionReward = field(init=False, repr=False, compare=False)

    gives_wins: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Wrap the function, which is imported later."""
        self._judge = FunctionReward(self.function)

    @property
    @override
    def title(self) -> str:
        return self._judge.title

    @property
    @override
    def fixed_rivals(self) -> bool:
        return self.baseline is not None

    def check(self, columns: set[str]) -> None:
        """Import the function, and compare its parameters and the baseline with the columns."""
        self._judge.check(columns)
        if self.baseline is not None and self.baseline not in columns:
            raise UserError(
                f"baseline: the data have no column '{self.baseline}'; they have "
                f"{', '.join(sorted(columns)) or 'none beside the prompt'}"
            )

    def setup(self, device: torch.device) -> None:
        """Import the function, if :meth:`check` was not called."""
        self._judge.setup(device)

    def score(self, prompts: list[str], completions: list[str], **columns: list[Any]) -> list[float | None]:
        """Mean probability of each completion to win."""
        pairs = self._pairs(prompts, completions, columns)
        if not pairs:
            return [None] * len(completions)
        answers: Any = self._judge.score(
            [prompts[i] for i, _, _ in pairs],
            [[completions[i], other] for i, _, other in pairs],  # type: ignore[misc]  # pairs, not texts
            **{name: [values[i] for i, _, _ in pairs] for name, values in columns.items()},
        )
        if len(answers) != len(pairs):
            raise UserError(
                f"{self.title} returned {len(answers)} probabilities for {len(pairs)} pairs; return one each"
            )
        wins: list[list[float]] = [[] for _ in completions]
        for (i, j, _), answer in zip(pairs, answers, strict=True):
            if answer is None or math.isnan(answer):
                continue
            if not 0 <= answer <= 1:
                raise UserError(
                    f"{self.title} returned {answer!r}; return the probability that the first of a pair wins, in [0, 1]"
                )
            wins[i].append(float(answer))
            if j is not None:
                wins[j].append(1 - float(answer))
        return [sum(found) / len(found) if found else None for found in wins]

    def _pairs(
        self, prompts: list[str], completions: list[str], columns: dict[str, list[Any]]
    ) -> list[tuple[int, int | None, str]]:
        """Pairs to compare: index of the completion, index of the other one (None: the baseline), the other's text."""
        if self.baseline is not None:
            return [(i, None, str(other)) for i, other in enumerate(columns[self.baseline])]
        # The responses to a prompt are consecutive. Consecutive rows with the same prompt count as one prompt: their
        # responses are just as comparable.
        pairs: list[tuple[int, int | None, str]] = []
        start = 0
        for i, prompt in enumerate(prompts):
            if prompt != prompts[start]:
                start = i
            pairs += [(j, i, completions[i]) for j in range(start, i)]
        return pairs
