"""Losses: from a combined score to a scalar loss."""

from moa_lightning.losses.base import LossTerms, PolicyLoss
from moa_lightning.losses.clipped_surrogate import ClippedSurrogate
from moa_lightning.losses.kl import KLPenalty, LossKL, RewardKL
from moa_lightning.losses.pairwise import PairwiseLogistic
from moa_lightning.losses.weighted_likelihood import WeightedLikelihood

__all__ = [
    "ClippedSurrogate",
    "KLPenalty",
    "LossKL",
    "LossTerms",
    "PairwiseLogistic",
    "PolicyLoss",
    "RewardKL",
    "WeightedLikelihood",
]
