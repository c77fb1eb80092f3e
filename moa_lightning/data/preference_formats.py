"""The layouts in which preferences are published, read into one.

A format turns a row of a file into a :class:`Comparison`: a prompt, its candidate responses and, for each named
objective, which of them wins against which.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moa_lightning.data.dialogues import ASSISTANT, split_dialogue

Prompt = str | list[dict[str, Any]]
Wins = list[list[float]]
"""``wins[i][j]`` is the probability that candidate i beats candidate j; NaN where nobody compared them."""


class BadRowError(ValueError):
    """What is wrong with a row: the field and the reason, in one line."""


@dataclass(frozen=True)
class Comparison:
    """One prompt, its candidates, and who wins under each objective."""

    prompt: Prompt
    responses: list[str]
    wins: dict[str, Wins | None]  # None: the row has no label for that objective


class PreferenceFormat(ABC):
    """Reads one layout. Subclasses are dataclasses."""

    @abstractmethod
    def read(self, row: Mapping[str, Any]) -> Comparison:
        """The comparison in a row.

        Raises:
            BadRowError: the row does not hold one.
        """


def from_winner(winner: Any, count: int, name: str) -> Wins:
    """Wins from the index of the winner, who beats every other candidate; nothing is said about the others."""
    if isinstance(winner, bool) or not isinstance(winner, int | float) or winner != int(winner):
        raise BadRowError(f"'{name}': the winner must be the index of a response, got {winner!r}")
    if not 0 <= winner < count:
        raise BadRowError(f"'{name}': winner {int(winner)} is no candidate; there are {count}, counted from 0")
    first = int(winner)
    return [
        [0.5 if i == j else 1.0 if i == first else 0.0 if j == first else math.nan for j in range(count)]
        for i in range(count)
    ]


def from_probability(probability: Any, count: int, name: str) -> Wins:
    """Wins of two candidates from the probability that the first one is better."""
    if count != 2:
        raise BadRowError(f"'{name}': one probability compares two responses, but there are {count}; give a win matrix")
    value = _probability(probability, name)
    return [[0.5, value], [1 - value, 0.5]]


def from_matrix(matrix: Any, count: int, name: str) -> Wins:
    """Wins from a whole matrix, whose transposed entries add to 1; null where nobody compared."""
    if not isinstance(matrix, Sequence) or len(matrix) != count or any(len(line or []) != count for line in matrix):
        raise BadRowError(f"'{name}': the win matrix must be {count} x {count}, one line and column for each response")
    wins = [[math.nan if p is None else _probability(p, name) for p in line] for line in matrix]
    for i in range(count):
        for j in range(i):
            total = wins[i][j] + wins[j][i]
            if math.isnan(wins[i][j]) != math.isnan(wins[j][i]) or abs(total - 1) > 1e-6:
                raise BadRowError(
                    f"'{name}': entries ({i}, {j}) and ({j}, {i}) of the win matrix are {wins[i][j]:g} and "
                    f"{wins[j][i]:g}; they must add to 1"
                )
        wins[i][i] = 0.5
    return wins


def from_scores(scores: Sequence[Any], name: str, scale: float | None = None) -> Wins | None:
    """Wins from one score for each response: the higher one wins, equal ones tie; ``None`` if a score is missing.

    Args:
        scores: one for each response.
        name: of the objective, for messages.
        scale: with it, Bradley and Terry's ``sigmoid((s_i - s_j) / scale)``.
    """
    if any(score is None for score in scores):
        return None
    try:
        values = [float(score) for score in scores]
    except (TypeError, ValueError) as error:
        raise BadRowError(f"'{name}': scores must be numbers, got {list(scores)!r}") from error
    if not all(math.isfinite(value) for value in values):
        return None
    if scale is None:
        return [[0.5 if a == b else float(a > b) for b in values] for a in values]
    return [[1 / (1 + math.exp(min(max((b - a) / scale, -500.0), 500.0))) for b in values] for a in values]


def _probability(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise BadRowError(f"'{name}': a win probability must lie in [0, 1], got {value!r}")
    return float(value)


@dataclass(frozen=True)
class Candidates(PreferenceFormat):
    """This project's own layout, for any number of responses and objectives.

    ``{"prompt": "…", "responses": ["…", "…"], "preferences": {"helpful": {"winner": 0}, "harmless": {"probability":
    0.7}, "humor": {"wins": [[0.5, 1.0], [0.0, 0.5]]}}}``: for each objective the index of the winner, the probability
    that the first of two responses is better, or the matrix of win probabilities; null or absent where
    nobody was asked. The prompt is text or chat messages.
    """

    def read(self, row: Mapping[str, Any]) -> Comparison:
        """The comparison as it stands."""
        responses, given = _field(row, "responses", list), _field(row, "preferences", dict)
        count = len(responses)
        wins: dict[str, Wins | None] = {}
        for name, label in given.items():
            if label is not None and not isinstance(label, dict):
                raise BadRowError(
                    f"'preferences.{name}' must hold winner, probability or wins, such as {{\"winner\": 0}}; got "
                    f"{label!r}"
                )
            found = {key: value for key, value in (label or {}).items() if value is not None}
            unknown = sorted(set(found) - {"winner", "probability", "wins"})
            if unknown or len(found) > 1:
                raise BadRowError(
                    f"'preferences.{name}' must hold one of winner, probability and wins; got {', '.join(found)}"
                )
            readers = {"winner": from_winner, "probability": from_probability, "wins": from_matrix}
            wins[name] = next((readers[key](value, count, name) for key, value in found.items()), None)
        return Comparison(_field(row, "prompt", (str, list)), responses, wins)


@dataclass(frozen=True)
class ChosenRejected(PreferenceFormat):
    r"""``chosen`` and ``rejected``, as TRL's preference data and HH-RLHF have them.

    The prompt is a column of its own, or is what the two share: of chat messages all but the last, of HH-RLHF's
    dialogues the text up to the last ``\n\nAssistant:``.

    Args:
        objective: name of what the pair was judged by.
        scores: further objectives from pairs of score columns, by name: ``helpful: [score_chosen, score_rejected]``;
            the higher score wins.
    """

    objective: str = "preference"
    scores: dict[str, list[str]] = field(default_factory=dict)

    def read(self, row: Mapping[str, Any]) -> Comparison:
        """The pair, the chosen response first."""
        chosen, rejected = (_field(row, name, (str, list)) for name in ("chosen", "rejected"))
        prompt = row.get("prompt")
        first: Any
        second: Any
        if isinstance(chosen, list) and isinstance(rejected, list):
            (before, first), (other, second) = _last_message(chosen, "chosen"), _last_message(rejected, "rejected")
            if prompt is None and before != other:
                raise BadRowError("'chosen' and 'rejected' differ before their last message; give a column 'prompt'")
            prompt = before if prompt is None else prompt
        elif isinstance(chosen, str) and isinstance(rejected, str):
            first, second = chosen, rejected
            if prompt is None:
                prompt, first, second = _split_pair(chosen, rejected)
        else:
            raise BadRowError("'chosen' and 'rejected' must both be text or both be messages")
        wins: dict[str, Wins | None] = {self.objective: from_winner(0, 2, self.objective)}
        for name, columns in self.scores.items():
            wins[name] = from_scores([_present(row, column) for column in columns], name)
        return Comparison(prompt, [first, second], wins)


@dataclass(frozen=True)
class SafeRLHF(PreferenceFormat):
    """PKU-SafeRLHF: ``prompt``, ``response_0``, ``response_1``, ``better_response_id`` and ``safer_response_id``.

    Args:
        better: name of the objective behind ``better_response_id``.
        safer: name of the objective behind ``safer_response_id``.
    """

    better: str = "helpful"
    safer: str = "harmless"

    def read(self, row: Mapping[str, Any]) -> Comparison:
        """The pair with its two labels."""
        responses = [_field(row, name, str) for name in ("response_0", "response_1")]
        wins: dict[str, Wins | None] = {}
        for name, column in ((self.better, "better_response_id"), (self.safer, "safer_response_id")):
            winner = _present(row, column)
            wins[name] = None if winner is None or winner == -1 else from_winner(winner, 2, column)
        return Comparison(_field(row, "prompt", str), responses, wins)


@dataclass(frozen=True)
class Ratings(PreferenceFormat):
    """UltraFeedback: ``instruction`` and ``completions``, each with ``response`` and ratings under ``annotations``.

    The higher rating wins; a rating that is missing or ``N/A`` leaves that objective without a label.

    Args:
        aspects: objectives by name, each with its key under ``annotations``.
        prompt_column: name of the column with the prompt.
    """

    aspects: dict[str, str] = field(
        default_factory=lambda: {
            name: name for name in ("helpfulness", "honesty", "instruction_following", "truthfulness")
        }
    )
    prompt_column: str = "instruction"

    def read(self, row: Mapping[str, Any]) -> Comparison:
        """All completions with the order of their ratings."""
        completions = _field(row, "completions", list)
        responses = [_field(completion, "response", str) for completion in completions]
        wins = {
            name: from_scores([self._rating(completion, key) for completion in completions], name)
            for name, key in self.aspects.items()
        }
        return Comparison(_field(row, self.prompt_column, str), responses, wins)

    def _rating(self, completion: Mapping[str, Any], key: str) -> Any:
        found = (completion.get("annotations") or {}).get(key)
        rating = found.get("Rating", found.get("rating")) if isinstance(found, Mapping) else found
        return None if rating in ("N/A", "", None) else rating


def _field(row: Mapping[str, Any], name: str, kind: type | tuple[type, ...]) -> Any:
    value = _present(row, name)
    if not isinstance(value, kind):
        names = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise BadRowError(f"'{name}' must be {names}, got {'null' if value is None else type(value).__name__}")
    return value


def _present(row: Mapping[str, Any], name: str) -> Any:
    if name not in row:
        raise BadRowError(f"there is no '{name}'; the row has {', '.join(row)}")
    return row[name]


def _last_message(messages: list[Any], name: str) -> tuple[list[Any], str]:
    if not messages or not isinstance(messages[-1], Mapping) or not isinstance(messages[-1].get("content"), str):
        raise BadRowError(f"'{name}' must end with a message that has 'content'")
    return list(messages[:-1]), str(messages[-1]["content"])


def _split_pair(chosen: str, rejected: str) -> tuple[str, str, str]:
    if ASSISTANT in chosen and ASSISTANT in rejected:
        (before, first), (other, second) = split_dialogue(chosen), split_dialogue(rejected)
        if before == other:
            return before, first, second
        # They part at an earlier turn: what follows there is the response.
    shared = next(
        (i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), min(len(chosen), len(rejected))
    )
    cut = chosen.rfind(ASSISTANT, 0, shared)
    if cut >= 0:
        cut += len(ASSISTANT)
    else:
        cut = max(chosen.rfind(" ", 0, shared), chosen.rfind("\n", 0, shared), 0)  # words stay whole
    if not chosen[:cut].strip():
        raise BadRowError("'chosen' and 'rejected' share no prompt; give a column 'prompt'")
    return chosen[:cut], chosen[cut:], rejected[cut:]
