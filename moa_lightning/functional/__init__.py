"""Pure tensor mathematics."""

from moa_lightning.functional.advantages import gae, group_relative, masked_moments
from moa_lightning.functional.pama import pama
from moa_lightning.functional.pareto import hypervolume, non_dominated

__all__ = ["gae", "group_relative", "hypervolume", "masked_moments", "non_dominated", "pama"]
