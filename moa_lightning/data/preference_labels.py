"""Preference labels in their various forms, converted to a matrix of win probabilities."""

import math
from collections.abc import Sequence
from typing import Any

from moa_lightning.errors import UserError

Wins = list[list[float]]
"""``wins[i][j]`` is the probability that candidate i beats candidate j; NaN if they were not compared."""


class BadRowError(UserError):
    """A row cannot be used; one line with the field and the reason."""


def from_winner(winner: Any, count: int, name: str) -> Wins:
    """Wins from the index of the winner, who beats every other candidate. The others tie with each other.

    If their comparisons were left out, only the lost one would count for each of them, and the mean over all candidates
    would be below 1/2.
    """
    if isinstance(winner, bool) or not isinstance(winner, int | float) or winner % 1 != 0:
        raise BadRowError(f"'{name}': the winner must be the index of a response, got {winner!r}")
    if not 0 <= winner < count:
        raise BadRowError(f"'{name}': winner {int(winner)} is no candidate; there are {count}, counted from 0")
    first = int(winner)
    return [[0.5 if (i == first) == (j == first) else float(i == first) for j in range(count)] for i in range(count)]


def from_probability(probability: Any, count: int, name: str) -> Wins:
    """Wins of two candidates from the probability that the first is better."""
    if count != 2:
        raise BadRowError(f"'{name}': one probability compares two responses, but there are {count}; give a win matrix")
    value = _probability(probability, name)
    return [[0.5, value], [1 - value, 0.5]]


def from_matrix(matrix: Any, count: int, name: str) -> Wins:
    """Wins from a full matrix, whose transposed entries add to 1; null where candidates were not compared.

    The diagonal is ignored and becomes 0.5.
    """
    lines = matrix if isinstance(matrix, list) else []
    if len(lines) != count or not all(isinstance(line, list) and len(line) == count for line in lines):
        raise BadRowError(f"'{name}': the win matrix must be {count} x {count}, one line and column for each response")
    wins = [[math.nan if is_missing(p) else _probability(p, name) for p in line] for line in lines]
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
        scale: of the Bradley-Terry model, ``sigmoid((s_i - s_j) / scale)``; ``None``: the higher score always wins.
    """
    values = numbers(scores, name)
    if not all(math.isfinite(value) for value in values):
        return None
    if scale is None:
        return [[0.5 if a == b else float(a > b) for b in values] for a in values]
    return [[1 / (1 + math.exp(min(max((b - a) / scale, -500.0), 500.0))) for b in values] for a in values]


def numbers(scores: Sequence[Any], name: str) -> list[float]:
    """Convert scores to floats, with NaN for missing ones."""
    try:
        return [math.nan if score is None else float(score) for score in scores]
    except (TypeError, ValueError) as error:
        raise BadRowError(f"'{name}': scores must be numbers, got {list(scores)!r}") from error


def _probability(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise BadRowError(f"'{name}': a win probability must lie in [0, 1], got {value!r}")
    return float(value)


def is_missing(value: Any) -> bool:
    """Whether a value is null, or NaN, which null becomes in a column of numbers."""
    return value is None or (isinstance(value, float) and math.isnan(value))
