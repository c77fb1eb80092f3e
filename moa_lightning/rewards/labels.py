"""Objectives that people, not models, have judged."""

from dataclasses import dataclass
from typing import Any, ClassVar

from moa_lightning.rewards.base import Reward

_WINS = "wins/"


@dataclass
class FromLabels(Reward):
    """The data's own preference labels: each candidate's mean win probability. For preference data.

    Args:
        label: name of the objective in the data.
    """

    label: str

    gives_wins: ClassVar[bool] = True

    def check(self, columns: set[str]) -> None:
        """Refuse data without that label."""
        known = sorted(name.removeprefix(_WINS) for name in columns if name.startswith(_WINS))
        if self.label not in known:
            raise ValueError(
                f"the data have no label '{self.label}'"
                + (f"; they have {', '.join(known)}" if known else "; FromLabels goes with data class Preferences")
            )

    def score(self, prompts: list[str], completions: list[str], **columns: list[Any]) -> list[float | None]:
        """The labels of the candidates."""
        labels = columns[_WINS + self.label]
        if any(isinstance(label, list) for label in labels):
            raise ValueError(
                "FromLabels knows the responses of the data alone, not new ones; use source PreferenceRows, or a "
                "reward that can score any response"
            )
        return [None if label != label else float(label) for label in labels]
