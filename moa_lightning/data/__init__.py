"""Data: prompts and preferences from files and from the hub, and the embedded task."""

from moa_lightning.data.base import PromptData, Row, Stage
from moa_lightning.data.preference_formats import Candidates, ChosenRejected, PreferenceFormat, Ratings, SafeRLHF
from moa_lightning.data.preferences import Preferences
from moa_lightning.data.prompts import Prompts
from moa_lightning.data.reviews import Reviews

__all__ = [
    "Candidates",
    "ChosenRejected",
    "PreferenceFormat",
    "Preferences",
    "PromptData",
    "Prompts",
    "Ratings",
    "Reviews",
    "Row",
    "SafeRLHF",
    "Stage",
]
