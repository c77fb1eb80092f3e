"""Sources of experience, and how rewards become advantages."""

from moa_lightning.sources.advantages import GAE, AdvantageEstimator, GroupRelative
from moa_lightning.sources.base import Actors, Source
from moa_lightning.sources.loader import ExperienceLoader
from moa_lightning.sources.preferences import PreferenceRows
from moa_lightning.sources.rollout import Rollout

__all__ = [
    "GAE",
    "Actors",
    "AdvantageEstimator",
    "ExperienceLoader",
    "GroupRelative",
    "PreferenceRows",
    "Rollout",
    "Source",
]
