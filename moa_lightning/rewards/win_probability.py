"""Any reward as a win probability against fixed responses.

Legend: B responses, M fixed ones.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from typing_extensions import override

from moa_lightning.errors import UserError
from moa_lightning.rewards.base import Reward, ShardModel


@dataclass
class WinProbability(Reward):
    """Probability that a response beats the fixed responses to its prompt, by another reward's scores of both.

    ``mean_m sigmoid((score - score_m) / scale)`` (the Bradley-Terry model): 0.5 is as good as the fixed responses.
    These do not change with the policy, so a threshold on this objective means the same throughout the run and in each
    evaluation. Without this reward, combiners of win probabilities compare the policy's own responses with each other,
    and 0.5 is only its current average.

    A response has no score if its prompt has no fixed response, or if the reward does not score both. The fixed
    responses are scored in the same call as each batch, each of them once, however many responses a prompt has.

    Args:
        reward: scores both.
        baseline: name of the column with the fixed responses: a text, or a list of texts, for each prompt.
        scale: difference in score at which the better one wins 73 % of the time; above 0. If it is about the reward's
            spread, differences count in proportion; if it is far below, only their sign counts.
    """

    reward: Reward
    baseline: str
    scale: float = 1.0

    gives_wins: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Validate hyperparameters."""
        if not 0 < self.scale < math.inf:
            raise UserError(f"WinProbability.scale must be a finite number above 0, got {self.scale}")
        if self.reward.gives_wins or self.reward.of_data_alone:
            raise UserError(
                f"WinProbability.reward must score any response by itself, got {self.reward.title}; use that reward as "
                "it is"
            )

    @property
    @override
    def title(self) -> str:
        return f"win probability by {self.reward.title}"

    @property
    @override
    def fixed_rivals(self) -> bool:
        return True

    def check(self, columns: set[str]) -> None:
        """Check the reward, and that the data have a column of fixed responses."""
        self.reward.check(columns)
        if self.baseline not in columns:
            raise UserError(
                f"baseline: the data have no column '{self.baseline}'; they have "
                f"{', '.join(sorted(columns)) or 'none beside the prompt'}"
            )

    @override
    def setup(self, device: torch.device) -> None:
        self.reward.setup(device)

    @override
    def shard(self, shard_model: ShardModel) -> None:
        self.reward.shard(shard_model)

    def score(self, prompts: list[str], completions: list[str], **columns: list[Any]) -> list[float | None]:
        """Mean probability of each completion to win."""
        fixed = [_texts(self.baseline, value) for value in columns[self.baseline]]
        # Responses to a prompt share their rivals, so each rival is scored once, for the first row that has it.
        first: dict[tuple[str, str], int] = {}
        for i, texts in enumerate(fixed):
            for text in texts:
                first.setdefault((prompts[i], text), i)
        rows = [*range(len(completions)), *first.values()]
        # One call for both: processes that share a sharded model must score equally often.
        answers: Any = self.reward.score(
            [prompts[i] for i in rows],
            completions + [text for _, text in first],
            **{name: [values[i] for i in rows] for name, values in columns.items()},
        )
        if len(answers) != len(rows):
            raise UserError(f"{self.reward.title} returned {len(answers)} scores for {len(rows)} completions")
        scores = [math.nan if answer is None else float(answer) for answer in answers]
        score_of = dict(zip(first, scores[len(completions) :], strict=True))
        return [self._wins(scores[i], [score_of[prompts[i], text] for text in texts]) for i, texts in enumerate(fixed)]

    def _wins(self, score: float, rivals: list[float]) -> float | None:
        found = [_sigmoid((score - rival) / self.scale) for rival in rivals if not math.isnan(score - rival)]
        return sum(found) / len(found) if found else None


def _texts(column: str, value: Any) -> list[str]:
    """The fixed responses of one row."""
    if value is None:
        return []
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise UserError(f"column '{column}' must hold a text, or a list of texts, for each prompt, got {value!r}")
    return list(texts)


def _sigmoid(difference: float) -> float:
    return 0.5 * (1 + math.tanh(difference / 2))  # no overflow
