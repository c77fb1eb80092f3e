"""Readers for the common layouts of preference data.

A format converts a row to a :class:`Comparison`: a prompt, its candidate responses and, for each named objective, their
win probabilities against each other.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from typing_extensions import override

from moa_lightning.data.dialogues import ASSISTANT, split_dialogue
from moa_lightning.data.preference_labels import (
    BadRowError,
    Wins,
    from_matrix,
    from_probability,
    from_scores,
    from_winner,
    is_missing,
    numbers,
)
from moa_lightning.errors import UserError

__all__ = [
    "BadRowError",
    "Candidates",
    "ChosenRejected",
    "Comparison",
    "PreferenceFormat",
    "Prompt",
    "Ratings",
    "SafeRLHF",
    "Wins",
    "clean_messages",
    "from_scores",
]

Prompt = str | list[dict[str, Any]]


@dataclass(frozen=True)
class Comparison:
    """A prompt, its candidates, and their win probabilities under each objective."""

    prompt: Prompt
    responses: list[str]
    wins: dict[str, Wins | None]  # None: the row has no label for that objective
    fields: tuple[str, ...] = ()  # name of each response's field in the row, for messages
    scores: dict[str, list[float]] = field(default_factory=dict)  # by name, a number for each response; NaN: none


class PreferenceFormat(ABC):
    """Reads one layout. Subclasses are dataclasses."""

    @abstractmethod
    def read(self, row: Mapping[str, Any]) -> Comparison:
        """Read the comparison in a row.

        Raises:
            BadRowError: the row has no valid comparison.
        """


@dataclass(frozen=True)
class Candidates(PreferenceFormat):
    """This project's own layout, for any number of responses and objectives.

    ``{"prompt": "…", "responses": ["…", "…"], "preferences": {"helpful": {"winner": 0}, "harmless": {"probability":
    0.7}, "humor": {"wins": [[0.5, 1.0], [0.0, 0.5]]}}}``: for each objective the index of the winner (the others tie),
    the probability that the first of two responses is better, or the matrix of win probabilities; null or absent if
    there is no label. Without ``preferences`` the row has no labels at all. The prompt is text or chat messages.
    ``"scores": {"length": [12, 40]}`` may hold numbers for each response, for reward ``FromScores``.
    """

    @override
    def read(self, row: Mapping[str, Any]) -> Comparison:
        prompt, responses = _field(row, "prompt", (str, list)), _field(row, "responses", list)
        given = _field(row, "preferences", dict) if row.get("preferences") is not None else {}
        count = len(_several(responses, "responses"))
        wins: dict[str, Wins | None] = {}
        for name, label in given.items():
            if label is not None and not isinstance(label, dict):
                raise BadRowError(
                    f"'preferences.{name}' must hold winner, probability or wins, such as {{\"winner\": 0}}; got "
                    f"{label!r}"
                )
            found = {key: value for key, value in (label or {}).items() if not is_missing(value)}
            unknown = sorted(set(found) - {"winner", "probability", "wins"})
            if unknown or len(found) > 1:
                raise BadRowError(
                    f"'preferences.{name}' must hold one of winner, probability and wins; it has {', '.join(found)}"
                )
            readers = {"winner": from_winner, "probability": from_probability, "wins": from_matrix}
            where = f"preferences.{name}"
            wins[name] = next((readers[key](value, count, where) for key, value in found.items()), None)
        scored = _field(row, "scores", dict) if row.get("scores") is not None else {}
        scores = {name: _scores(values, count, f"scores.{name}") for name, values in scored.items()}
        return Comparison(prompt, responses, wins, tuple(f"responses[{i}]" for i in range(count)), scores)


@dataclass(frozen=True)
class ChosenRejected(PreferenceFormat):
    r"""``chosen`` and ``rejected``, as in TRL's preference data and HH-RLHF.

    The prompt is a separate column, or the common part of the two: all chat messages but the last, or the text of an
    HH-RLHF dialogue up to the last ``\n\nAssistant:``.

    Args:
        objective: name of the objective that the pair was judged by.
        scores: further objectives from pairs of score columns, by name: ``helpful: [score_chosen, score_rejected]``;
            the higher score wins. Reward ``FromScores`` reads the numbers themselves.
    """

    objective: str = "preference"
    scores: dict[str, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Validate that each further objective has two columns and its own name."""
        for name, columns in self.scores.items():
            if len(columns) != 2 or name == self.objective:
                raise UserError(
                    f"ChosenRejected.scores.{name} must be [column of chosen, column of rejected], under another name "
                    f"than objective '{self.objective}'; got {columns}"
                )

    def read(self, row: Mapping[str, Any]) -> Comparison:
        """Read the pair, with the chosen response first."""
        chosen, rejected = (_field(row, name, (str, list)) for name in ("chosen", "rejected"))
        prompt = _field(row, "prompt", (str, list)) if "prompt" in row else None
        first: Any
        second: Any
        if isinstance(chosen, list) and isinstance(rejected, list):
            (before, first), (other, second) = _last_message(chosen, "chosen"), _last_message(rejected, "rejected")
            if before != other:
                raise BadRowError("'chosen' and 'rejected' differ before their last message; they must share the rest")
            prompt = _whole_prompt(prompt, before)
        elif isinstance(chosen, str) and isinstance(rejected, str):
            first, second = chosen, rejected
            if prompt is None:
                prompt, first, second = _split_pair(chosen, rejected)
            elif isinstance(prompt, str) and chosen.startswith(prompt) and rejected.startswith(prompt):
                first, second = chosen.removeprefix(prompt), rejected.removeprefix(prompt)  # some datasets repeat it
        else:
            raise BadRowError("'chosen' and 'rejected' must both be text or both be messages")
        wins: dict[str, Wins | None] = {self.objective: from_winner(0, 2, self.objective)}
        given = {name: [_present(row, column) for column in columns] for name, columns in self.scores.items()}
        wins |= {name: from_scores(values, name) for name, values in given.items()}
        scores = {name: numbers(values, name) for name, values in given.items()}
        return Comparison(prompt, [first, second], wins, ("chosen", "rejected"), scores)


@dataclass(frozen=True)
class SafeRLHF(PreferenceFormat):
    """PKU-SafeRLHF: ``prompt``, ``response_0``, ``response_1``, ``better_response_id`` and ``safer_response_id``.

    Args:
        better: name of the objective that ``better_response_id`` labels.
        safer: name of the objective that ``safer_response_id`` labels.
    """

    better: str = "helpful"
    safer: str = "harmless"

    def read(self, row: Mapping[str, Any]) -> Comparison:
        """Read the pair with its two labels."""
        fields = ("response_0", "response_1")
        prompt, responses = _field(row, "prompt", str), [_field(row, name, str) for name in fields]
        wins: dict[str, Wins | None] = {}
        for name, column in ((self.better, "better_response_id"), (self.safer, "safer_response_id")):
            winner = _present(row, column)
            wins[name] = None if is_missing(winner) or winner == -1 else from_winner(winner, 2, column)
        return Comparison(prompt, responses, wins, fields)


@dataclass(frozen=True)
class Ratings(PreferenceFormat):
    """UltraFeedback: ``instruction`` and ``completions``, each with ``response`` and ratings under ``annotations``.

    The higher rating wins. If a rating is missing or ``N/A``, the row has no label for that objective.

    Args:
        aspects: the key under ``annotations`` for each objective.
        prompt_column: name of the column with the prompt.
    """

    aspects: dict[str, str] = field(
        default_factory=lambda: {
            name: name for name in ("helpfulness", "honesty", "instruction_following", "truthfulness")
        }
    )
    prompt_column: str = "instruction"

    def read(self, row: Mapping[str, Any]) -> Comparison:
        """Read all completions, compared by their ratings."""
        prompt = _field(row, self.prompt_column, str)
        completions = _several(_field(row, "completions", list), "completions")
        if not all(isinstance(completion, Mapping) for completion in completions):
            raise BadRowError("'completions' must hold objects with 'response' and 'annotations'")
        responses = [completion.get("response") for completion in completions]
        ratings = {name: [self._rating(c, key) for c in completions] for name, key in self.aspects.items()}
        wins = {name: from_scores(values, name) for name, values in ratings.items()}
        fields = tuple(f"completions[{i}].response" for i in range(len(responses)))
        return Comparison(prompt, responses, wins, fields, {n: numbers(values, n) for n, values in ratings.items()})

    def _rating(self, completion: Mapping[str, Any], key: str) -> Any:
        annotations = completion.get("annotations")
        found = annotations.get(key) if isinstance(annotations, Mapping) else None
        rating = found.get("Rating", found.get("rating")) if isinstance(found, Mapping) else found
        return None if rating in ("N/A", "", None) else rating


def _field(row: Mapping[str, Any], name: str, kind: type | tuple[type, ...]) -> Any:
    value = _present(row, name)
    if value is None:
        raise BadRowError(f"'{name}' is missing")
    if not isinstance(value, kind):
        names = " or ".join(_KINDS[k] for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise BadRowError(f"'{name}' must be {names}, got {value!r:.40}")
    return value


_KINDS: dict[type, str] = {str: "text", list: "a list", dict: "an object"}


def _scores(values: Any, count: int, name: str) -> list[float]:
    if values is None:
        return [math.nan] * count
    if not isinstance(values, list) or len(values) != count:
        raise BadRowError(f"'{name}' must hold one number for each of the {count} responses, got {values!r:.40}")
    return numbers(values, name)


def _several(found: list[Any], name: str) -> list[Any]:
    if len(found) < 2:
        raise BadRowError(f"'{name}' must hold two or more, it holds {len(found)}")
    return found


def _present(row: Mapping[str, Any], name: str) -> Any:
    if name not in row:
        raise BadRowError(f"there is no '{name}'; the row has {', '.join(row)}")
    return row[name]


def clean_messages(messages: list[Any], name: str) -> list[dict[str, Any]]:
    """Drop null fields of chat messages: all rows of a file have the same fields.

    Raises:
        BadRowError: the list is empty, or holds something else.
    """
    if not messages or not all(
        isinstance(m, Mapping) and all(isinstance(m.get(key), str) for key in ("role", "content")) for m in messages
    ):
        raise BadRowError(f"'{name}' must be text or a list of messages with 'role' and 'content'")
    return [{key: value for key, value in message.items() if value is not None} for message in messages]


def _last_message(messages: list[Any], name: str) -> tuple[list[dict[str, Any]], str]:
    cleaned = clean_messages(messages, name)
    return cleaned[:-1], str(cleaned[-1]["content"])


def _whole_prompt(prompt: Prompt | None, before: list[dict[str, Any]]) -> Prompt:
    """Join the prompt column with the messages before the last one, without repeating those that both have."""
    if prompt is None and not before:
        raise BadRowError("'chosen' and 'rejected' hold one message each, and there is no 'prompt'")
    if not before or prompt is None:
        return before or prompt or ""
    if isinstance(prompt, str):
        return before
    messages = clean_messages(prompt, "prompt")
    return before if before[: len(messages)] == messages else messages + before


def _split_pair(chosen: str, rejected: str) -> tuple[str, str, str]:
    if ASSISTANT in chosen and ASSISTANT in rejected:
        (before, first), (other, second) = split_dialogue(chosen), split_dialogue(rejected)
        if before == other:
            return before, first, second
        # They differ at an earlier turn: the response is everything after that.
    shared = next(
        (i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), min(len(chosen), len(rejected))
    )
    end = chosen.rfind(ASSISTANT, 0, shared)
    if end >= 0:
        end += len(ASSISTANT)
    elif ASSISTANT in chosen and ASSISTANT in rejected:
        raise BadRowError("'chosen' and 'rejected' differ before the first answer; they must share the question")
    else:
        end = max(chosen.rfind(" ", 0, shared), chosen.rfind("\n", 0, shared), 0)  # at the end of a word
    if not chosen[:end].strip():
        raise BadRowError("'chosen' and 'rejected' share no prompt; give a column 'prompt'")
    return chosen[:end], chosen[end:], rejected[end:]
