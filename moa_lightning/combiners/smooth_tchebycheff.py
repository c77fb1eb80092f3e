"""Smooth Tchebycheff scalarisation: the objectives far from their ideal decide together.

Legend: B sequences, N objectives.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from moa_lightning.combiners.claims import CONVEX, Claim
from moa_lightning.combiners.shared.ideal import DistanceToIdeal
from moa_lightning.combiners.shared.responses import ScoredResponses
from moa_lightning.errors import UserError
from moa_lightning.functional.scalarize import smooth_tchebycheff
from moa_lightning.schedules import Weight
from moa_lightning.types import State


@dataclass(frozen=True)
class SmoothTchebycheff(DistanceToIdeal):
    """Train on ``-mu log sum_i exp(w_i (z_i - s_i) / mu)``: ``Tchebycheff`` without its kinks.

    Within ``mu log N`` of ``Tchebycheff``; where several objectives are about as far from the ideal, all of them are
    improved at once. Like it, on whole responses: there is no such score of a token. Baseline and scale: the mean over
    the responses to the prompt (over the batch where a response is alone) is taken off, because a constant would be
    noise to the policy gradient, and what is left is divided by its standard deviation over the batch.

    The distances are in the objectives' units, and so is a KL penalty (``RewardKL``), which is taken off the combined
    score.

    Choose it when: ``Tchebycheff`` is what you mean but follows one objective at a time.
    Cost: no extra backward pass.
    Convergence: none stated for policies; of exact optimisation, for small ``mu`` as ``Tchebycheff``.
    Source: Lin et al. 2024, "Smooth Tchebycheff Scalarization for Multi-Objective Optimization", arXiv 2402.19078.
    Deviations: those of ``Tchebycheff`` where scores are missing.

    Formula: ``A = -mu log sum_i exp(w_i (z_i - s_i) / mu)``, less its mean over the responses to the prompt, in
    standard deviations.
    Symbols: ``mu`` is ``mu``; ``w`` is ``weights``; ``z`` is ``ideal``; ``s_i`` is ``scores_BN[:, i]``.
    Missing score: takes the mean of the prompt's other responses; is left out of prompts without any.
    Watch: ``weights/<name>``: all equal, ``mu`` is large and this is nearly a plain mean; one at 1, it is
    ``Tchebycheff``.

    Args:
        mu: how far behind the worst objective another one still counts, in units of the weighted distance, above 0.
        weights: weight of each objective by name, non-negative, not all 0; divided by their sum. ``None`` takes
            the ``weight`` of each objective.
        ideal: the ideal score by name. An objective that is not named, or all with ``None``, takes the best score that
            any response has had so far.
    """

    mu: float = 0.1
    weights: dict[str, Weight] | None = None
    ideal: dict[str, float] | None = None

    claims: ClassVar[frozenset[Claim]] = CONVEX

    def __post_init__(self) -> None:
        if not 0 < self.mu < math.inf:
            raise UserError(f"SmoothTchebycheff needs a finite mu > 0, got {self.mu}; its limit at 0 is Tchebycheff")

    def scalarize(self, responses: ScoredResponses, weights_N: Tensor, state: State) -> tuple[Tensor, Tensor]:
        """``-mu log sum_i exp(w_i (z_i - s_i) / mu)``."""
        scores_BN, present_BN = responses.filled()
        return smooth_tchebycheff(scores_BN, self.point(state, scores_BN), weights_N, self.mu, present_BN)
