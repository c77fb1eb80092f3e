"""GDPO: each objective is standardised among the responses to a prompt before they are added.

Legend: B sequences, N objectives.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from moa_lightning.combiners.claims import CONVEX, Claim
from moa_lightning.combiners.shared.responses import ScoredResponses
from moa_lightning.combiners.shared.scores import ScoreCombiner
from moa_lightning.functional.scalarize import group_standardize, weighted_sum
from moa_lightning.schedules import Weight
from moa_lightning.signals import Signal
from moa_lightning.types import State


@dataclass(frozen=True)
class GDPO(ScoreCombiner):
    """Train on the weighted sum of the objectives, each standardised within its prompt, brought to the batch's scale.

    If the sum were standardised, as in GRPO, winning one objective would be as good as winning two; and an objective
    of large spread would drown the others. Standardised first, each counts in proportion to its weight.

    The sum has mean 0 over the responses to each prompt, which is the baseline; the batch step divides it by its
    standard deviation over the collected batch, over all processes. A KL penalty (``RewardKL``) is in units of the sum,
    so of standard deviations.

    Choose it when: you have weights, rewards in different units, and several responses to a prompt.
    Cost: no extra backward pass.
    Convergence: none stated.
    Source: Liu et al. 2026, "GDPO: Group reward-Decoupled Normalization Policy Optimization", arXiv 2601.05242.
    Deviations: no constant is added to the standard deviations, and an objective that all responses to a prompt share
    adds 0; one that could not score a response adds 0 there.

    Formula: ``A = sum_i w_i Z_i`` with ``Z_i = (s_i - mean_i) / std_i`` over the responses to the prompt; then divided
    by its standard deviation over the batch.
    Symbols: ``w`` is ``weights``; ``s_i`` is ``scores_BN[:, i]``.
    Missing score: adds 0 there (``Z_i = 0``); mean and deviation are those of the prompt's other responses.
    Watch: ``rewards/<name>/std``: at 0, all responses to a prompt score alike and the objective adds nothing; raise
    ``num_generations`` or the temperature.

    Args:
        weights: weight of each objective by name, non-negative, not all 0; divided by their sum. ``None`` takes
            the ``weight`` of each objective.
    """

    weights: dict[str, Weight] | None = None

    needs: ClassVar[frozenset[Signal]] = frozenset({Signal.SCORES, Signal.GROUPS})
    claims: ClassVar[frozenset[Claim]] = CONVEX | {
        Claim.ONE_OBJECTIVE,
        Claim.COMMON_SCALE,
        Claim.OWN_SCALE,
        Claim.SHIFT,
    }

    def scalarize(self, responses: ScoredResponses, weights_N: Tensor, state: State) -> tuple[Tensor, Tensor]:
        """``sum_i w_i Z_i``."""
        z_BN = group_standardize(responses.scores_BN, responses.valid_BN, responses.group_B)
        return weighted_sum(z_BN, weights_N, responses.valid_BN)
