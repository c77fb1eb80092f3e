"""Pure functions of tensors: the mathematics of the methods."""

from moa_lightning.functional.advantages import gae, group_relative, masked_sum
from moa_lightning.functional.caid import ReferenceDual, ReferenceSamples, reference_dual
from moa_lightning.functional.dual import DualSolution, one_shot_dual
from moa_lightning.functional.dynamic import front_factor, grow_front, influence, mirror_step
from moa_lightning.functional.gramian import parameter_gradients, representation_gramian, weights_from_gramian
from moa_lightning.functional.logprobs import token_logprobs
from moa_lightning.functional.mopo import mopo_policy, robust_value
from moa_lightning.functional.pairwise import (
    clip_around_first,
    confidence_weights,
    dpo_loss,
    ipo_loss,
    modpo_logits,
    response_log_ratio,
    virtual_reference,
)
from moa_lightning.functional.pama import pama
from moa_lightning.functional.pareto import hypervolume, non_dominated
from moa_lightning.functional.preference import (
    bradley_terry_wins,
    fill_from_group,
    fill_scores,
    group_count,
    group_max,
    group_softmax,
    group_sum,
    mean_wins,
    truncated_log_ratio,
)
from moa_lightning.functional.scalarize import (
    group_centered,
    group_covariance,
    group_standardize,
    smooth_tchebycheff,
    soft_minimum,
    tchebycheff,
    weighted_sum,
)
from moa_lightning.functional.surrogate import (
    clipped_surrogate,
    is_clipped,
    probability_ratio,
    sequence_ratio,
    squared_log_ratio,
    value_loss,
)
from moa_lightning.functional.verdict import threshold_verdict

__all__ = [
    "DualSolution",
    "ReferenceDual",
    "ReferenceSamples",
    "bradley_terry_wins",
    "clip_around_first",
    "clipped_surrogate",
    "confidence_weights",
    "dpo_loss",
    "fill_from_group",
    "fill_scores",
    "front_factor",
    "gae",
    "group_centered",
    "group_count",
    "group_covariance",
    "group_max",
    "group_relative",
    "group_softmax",
    "group_standardize",
    "group_sum",
    "grow_front",
    "hypervolume",
    "influence",
    "ipo_loss",
    "is_clipped",
    "masked_sum",
    "mean_wins",
    "mirror_step",
    "modpo_logits",
    "mopo_policy",
    "non_dominated",
    "one_shot_dual",
    "pama",
    "parameter_gradients",
    "probability_ratio",
    "reference_dual",
    "representation_gramian",
    "response_log_ratio",
    "robust_value",
    "sequence_ratio",
    "smooth_tchebycheff",
    "soft_minimum",
    "squared_log_ratio",
    "tchebycheff",
    "threshold_verdict",
    "token_logprobs",
    "truncated_log_ratio",
    "value_loss",
    "virtual_reference",
    "weighted_sum",
    "weights_from_gramian",
]
