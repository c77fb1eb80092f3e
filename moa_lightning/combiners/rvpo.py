"""RVPO: a smooth minimum of the objectives, each standardised among the responses to a prompt.

Legend: B sequences, N objectives.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from moa_lightning.combiners.claims import CONVEX, Claim
from moa_lightning.combiners.shared.responses import ScoredResponses
from moa_lightning.combiners.shared.scores import ScoreCombiner
from moa_lightning.errors import UserError
from moa_lightning.functional.scalarize import group_standardize, soft_minimum
from moa_lightning.schedules import Weight
from moa_lightning.signals import Signal
from moa_lightning.types import State


@dataclass(frozen=True)
class RVPO(ScoreCombiner):
    """Train on ``-(1/k) log sum_i w_i exp(-k Z_i)``: no objective's success makes up for another one's failure.

    ``Z_i`` is objective i's score, standardised over the responses to the prompt. To second order in k the score is
    their mean less ``k/2`` times their variance; from the mean (k small: ``GDPO``) it moves to the minimum (k large).

    A smooth minimum lies below the mean, so unlike GDPO's sum it is not centred. Baseline and scale: the mean over
    the responses to the prompt is taken off, because a constant would be noise to the policy gradient, and
    what is left is divided by its standard deviation over the batch. A KL penalty (``RewardKL``) is in units of Z.

    Choose it when: no objective may be neglected for the sum of the others, and their rewards differ in unit.
    Cost: no extra backward pass.
    Convergence: none stated.
    Source: Montero et al. 2026, "RVPO: Risk-Sensitive Alignment via Variance Regularization", arXiv 2605.05750, where
    the weights are equal. Deviations: weights; no constant is added to the standard deviations; an objective that could
    not score a response has Z = 0 there, and one that scored no response to a prompt is left out of all of them.

    Formula: ``A = -(1/k) log sum_i w_i exp(-k Z_i)`` with ``Z_i = (s_i - mean_i) / std_i`` over the responses to the
    prompt, less its mean there, in standard deviations of the batch.
    Symbols: ``k`` is ``k``; ``w`` is ``weights``, equal in the paper; ``s_i`` is ``scores_BN[:, i]``.
    Missing score: has ``Z_i = 0`` there; is left out of prompts without any.
    Watch: ``val/rewards/<name>/mean`` of the weakest objective: if it does not move, raise ``k``; if all move slowly,
    lower it.

    Args:
        k: aversion to unequal objectives, above 0.
        weights: weight of each objective by name, non-negative, not all 0; divided by their sum. ``None`` takes
            the ``weight`` of each objective.
    """

    k: float = 1.0
    weights: dict[str, Weight] | None = None

    needs: ClassVar[frozenset[Signal]] = frozenset({Signal.SCORES, Signal.GROUPS})
    claims: ClassVar[frozenset[Claim]] = CONVEX | {
        Claim.ONE_OBJECTIVE,
        Claim.COMMON_SCALE,
        Claim.OWN_SCALE,
        Claim.SHIFT,
    }

    def __post_init__(self) -> None:
        if not 0 < self.k < math.inf:
            raise UserError(f"RVPO needs a finite k > 0, got {self.k}; its limit at 0 is GDPO")

    def scalarize(self, responses: ScoredResponses, weights_N: Tensor, state: State) -> tuple[Tensor, Tensor]:
        """``-(1/k) log sum_i w_i exp(-k Z_i)``."""
        z_BN = group_standardize(responses.scores_BN, responses.valid_BN, responses.group_B)
        return soft_minimum(z_BN, weights_N, self.k, responses.filled()[1])
