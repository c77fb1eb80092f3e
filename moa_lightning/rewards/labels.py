"""Objectives from the data themselves: preference labels, or numbers."""

from dataclasses import dataclass
from typing import Any, ClassVar

from moa_lightning.errors import UserError
from moa_lightning.rewards.base import Reward


@dataclass
class _OfCandidates(Reward):
    """Reads a column of the data with an entry for each candidate.

    Args:
        label: name of the objective in the data.
    """

    label: str

    prefix: ClassVar[str]
    what: ClassVar[str]
    of_data_alone: ClassVar[bool] = True

    def check(self, columns: set[str]) -> None:
        """Refuse data without this column."""
        known = sorted(name.removeprefix(self.prefix) for name in columns if name.startswith(self.prefix))
        if self.label not in known:
            raise UserError(
                f"the data have no {self.what} '{self.label}'"
                + (f"; they have {', '.join(known)}" if known else f"; {self.title} goes with data class Preferences")
            )

    def score(self, prompts: list[str], completions: list[str], **columns: list[Any]) -> list[float | None]:
        """Return the data's entries for the candidates."""
        values = columns[self.prefix + self.label]
        if any(isinstance(value, list) for value in values):
            raise UserError(
                f"{self.title} knows the responses of the data alone, not new ones; use source PreferenceRows, or a "
                "reward that can score any response"
            )
        return [None if value != value else float(value) for value in values]


@dataclass
class FromLabels(_OfCandidates):
    """The data's own preference labels: each candidate's mean win probability. For preference data.

    Args:
        label: name of the objective in the data.
    """

    prefix: ClassVar[str] = "wins/"
    what: ClassVar[str] = "label"
    gives_wins: ClassVar[bool] = True


@dataclass
class FromScores(_OfCandidates):
    """Numbers in the data for each candidate, such as ratings: a margin for MODPO, or an objective.

    Args:
        label: name of the scores in the data.
    """

    prefix: ClassVar[str] = "scores/"
    what: ClassVar[str] = "scores"
