"""P-GAPO: the user's weights on rescaled gradients.

Legend: N objectives.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor
from typing_extensions import override

from moa_lightning.combiners.claims import CONVEX, Claim
from moa_lightning.combiners.shared.gradients import GradientCombiner, Place
from moa_lightning.combiners.shared.weighted import Weighted
from moa_lightning.schedules import Weight
from moa_lightning.types import State


@dataclass(frozen=True)
class PGAPO(Weighted, GradientCombiner):
    """Train on the weighted sum of gradients that were divided by a power of their norm, with weights of your own.

    With ``Linear`` an objective of steep gradients outweighs the others whatever its weight says; here the weights are
    shares of the direction ``sum_i w_i g_i / |g_i|^power``.

    Choose it when: you have weights, and they should hold for directions whatever the gradients' lengths are.
    Cost: as ``at`` says: one backward pass through the head, or N.
    Convergence: none stated.
    Source: Li et al., "Gradient-Adaptive Policy Optimization", ACL 2025, arXiv 2507.01915 (P-GAPO). Deviations: as
    with ``GAPO``.

    Formula: ``A = sum_i a_i A_i / sum_i a_i`` with ``a_i = w_i / |g_i|^p``.
    Symbols: ``w`` is ``weights``; ``p`` is ``power``; ``a``, divided by its sum, is ``weights/<name>`` in the logs;
    ``g_i`` is the gradient of objective i's surrogate where ``at`` says.
    Missing score: adds 0 there, to the gradient as well; without any score in a minibatch its weight is 0.
    Watch: ``weights/<name>`` against the weights that you set: their ratio says how unequal the gradients are.

    Args:
        power: of the norm that each gradient is divided by.
        weights: weight of each objective by name, non-negative, not all 0; divided by their sum. ``None`` takes
            the ``weight`` of each objective.
        at: where gradients are taken: ``representation``, ``last_layer`` or all trained ``parameters``.
    """

    power: Literal[1, 2] = 1
    weights: dict[str, Weight] | None = None
    at: Place = "representation"

    claims: ClassVar[frozenset[Claim]] = CONVEX | {Claim.ONE_OBJECTIVE, Claim.COMMON_SCALE}

    @property
    @override
    def norm_power(self) -> float:
        return float(self.power)

    def weigh(self, gram_NN: Tensor, present_N: Tensor, state: State) -> Tensor:
        """The user's weights of those that have a gradient."""
        return state["weights"].cpu()[present_N]
