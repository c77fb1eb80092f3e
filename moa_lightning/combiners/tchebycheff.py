"""Tchebycheff scalarisation: the objective that is furthest from its ideal decides.

Legend: B sequences, N objectives.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from moa_lightning.combiners.claims import CONVEX, Claim
from moa_lightning.combiners.shared.ideal import DistanceToIdeal
from moa_lightning.combiners.shared.responses import ScoredResponses
from moa_lightning.functional.scalarize import tchebycheff
from moa_lightning.schedules import Weight
from moa_lightning.types import State


@dataclass(frozen=True)
class Tchebycheff(DistanceToIdeal):
    """Train on ``min_i w_i (s_i - z_i)``: how far the worst objective of a response is from the ideal point z.

    Its optima reach all of the front, concave parts included, which no weighted sum does: a balanced response beats
    two specialists whose mean is better. It is a minimum over the scores of whole responses, in which what is worst may
    differ from one response to the next; asked per token it would have no meaning, and there is no such option (PAMA
    has weights per token). Baseline and scale: the mean over the responses to the prompt (over the batch where a
    response is alone) is taken off, because a constant would be noise to the policy gradient, and what is left is
    divided by its standard deviation over the batch.

    The distances are in the objectives' units: give objectives one range (``scale``, ``shift``), or weights that undo
    their ranges. A KL penalty (``RewardKL``) is taken off the combined score, in the units of the weighted distance.

    Choose it when: a response is as good as its worst objective, in units that can be compared.
    Cost: no extra backward pass.
    Convergence: none stated for policies; every Pareto-optimal point is an exact optimum for some weights.
    Source: Miettinen, "Nonlinear Multiobjective Optimization", 1999, section 3.4. Deviations: an objective that could
    not score a response counts as the mean of the prompt's other responses; one that scored none of them is
    left out there.

    Formula: ``A = min_i w_i (s_i - z_i)``, less its mean over the responses to the prompt, in standard deviations.
    Symbols: ``w`` is ``weights``; ``z`` is ``ideal``; ``s_i`` is ``scores_BN[:, i]``.
    Missing score: takes the mean of the prompt's other responses; is left out of prompts without any.
    Watch: ``weights/<name>``, the share of responses that the objective decided: at 1, the others' scores have no
    effect, so check units and ``ideal``.

    Args:
        weights: weight of each objective by name, non-negative, not all 0; divided by their sum. ``None`` takes
            the ``weight`` of each objective. A larger one draws the policy nearer to that objective's ideal.
        ideal: the ideal score by name. An objective that is not named, or all with ``None``, takes the best score that
            any response has had so far; one outlier moves it for good, so name the ideal of a reward without bounds.
    """

    weights: dict[str, Weight] | None = None
    ideal: dict[str, float] | None = None

    claims: ClassVar[frozenset[Claim]] = CONVEX

    @property
    def claimed(self) -> frozenset[Claim]:
        """So does it their unit."""
        return super().claimed if self.ideal else super().claimed | {Claim.COMMON_SCALE}

    def scalarize(self, responses: ScoredResponses, weights_N: Tensor, state: State) -> tuple[Tensor, Tensor]:
        """``min_i w_i (s_i - z_i)``."""
        scores_BN, present_BN = responses.filled()
        return tchebycheff(scores_BN, self.point(state, scores_BN), weights_N, present_BN)
