"""P-GAPO: the user's weights on rescaled gradients.

Legend: N objectives.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from moa_lightning.combiners.gradients import GradientCombiner, Place
from moa_lightning.combiners.weights import named_weights
from moa_lightning.types import State


@dataclass(frozen=True)
class PGAPO(GradientCombiner):
    """Train on the weighted sum of gradients that were divided by a power of their norm, with weights of your own.

    With ``Linear`` an objective of steep gradients outweighs the others whatever its weight says; here the weights are
    shares of the direction ``sum_i w_i g_i / |g_i|^power``.

    Source: Li et al., "Gradient-Adaptive Policy Optimization", ACL 2025, arXiv 2507.01915 (P-GAPO). Deviations: as
    with ``GAPO``.

    Args:
        power: of the norm that each gradient is divided by.
        weights: weight of each objective by name, non-negative, not all 0; divided by their sum. ``None`` takes
            the ``weight`` of each objective.
        at: where gradients are taken: ``representation``, ``last_layer`` or all trained ``parameters``.
    """

    power: Literal[1, 2] = 1
    weights: dict[str, float] | None = None
    at: Place = "representation"

    @property
    def norm_power(self) -> float:
        """``power``."""
        return float(self.power)

    def init(self, objectives: Sequence[str], weights_N: Tensor) -> State:
        """The weights by name."""
        return {"weights": named_weights(self.weights, objectives, weights_N)}

    def resume(self, saved: State, fresh: State) -> State:
        """The configuration's weights."""
        return fresh

    def weigh(self, gram_NN: Tensor, present_N: Tensor, state: State) -> Tensor:
        """The user's weights of those that have a gradient."""
        return state["weights"].cpu()[present_N]
