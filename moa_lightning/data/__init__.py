"""Prompts: from files, from the hub, and from the embedded task."""

from moa_lightning.data.base import PromptData, Row, Stage
from moa_lightning.data.prompts import Prompts
from moa_lightning.data.reviews import Reviews

__all__ = ["PromptData", "Prompts", "Reviews", "Row", "Stage"]
