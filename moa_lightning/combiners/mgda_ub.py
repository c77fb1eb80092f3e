"""MGDA-UB: the min-norm point of the gradients at the shared representation.

Legend: N objectives.
"""

from dataclasses import dataclass
from typing import ClassVar

from typing_extensions import override

from moa_lightning.combiners.claims import CONVEX, Claim
from moa_lightning.combiners.shared.gradients import MinNorm, Place


@dataclass(frozen=True)
class MGDAUB(MinNorm):
    """Train on the weighted sum whose gradient at the last hidden state has the smallest norm.

    ``min_c c'Gc`` over the simplex, G the Gram matrix of the N surrogate gradients at the shared representation,
    summed over all processes; solved by TorchJD. The weights then combine the advantages, and one ordinary
    backward pass follows.

    Choose it when: no objective may get worse, and you have no weights.
    Cost: one backward pass through the head for all objectives, and a small solve.
    Convergence: proved, to Pareto-stationary points, where the representation's Jacobian has full rank.
    Source: Sener & Koltun, "Multi-Task Learning as Multi-Objective Optimization", 2018, arXiv 1810.04650; the min-norm
    point is Désidéri's, 2012. Deviations: the Gram matrix takes one backward pass through the head for all
    objectives, not one each (see ``functional.representation_gramian``; the result is the same); an objective
    without gradient is left out, because it would be the min-norm point by itself and stop the others.

    Formula: ``A = sum_i c_i A_i`` with ``c = argmin c'Gc`` over the simplex, ``G_ij = g_i . g_j``.
    Symbols: ``c`` is ``weights/<name>`` in the logs; ``g_i`` is the gradient of objective i's surrogate at the last
    hidden state; ``G`` is ``signals.gramian``.
    Missing score: adds 0 there, to the gradient as well; without any score in a minibatch its weight is 0.
    Watch: ``weights/<name>``: the shortest gradient gets the most weight; where one objective keeps nearly all of it,
    try ``normalize``.

    Args:
        normalize: divide each gradient by its norm first, so that an objective of large scale is not ignored
            (the norm's minimum goes to the shortest gradients).
        max_iters: iterations of the Frank-Wolfe solver, at most. So many come near for a few objectives; 16 take
            thousands to the shortest direction, though without conflict it is before.
        epsilon: step size below which it stops.
    """

    normalize: bool = False
    max_iters: int = 250
    epsilon: float = 1e-5

    claims: ClassVar[frozenset[Claim]] = CONVEX | {
        Claim.ONE_OBJECTIVE,
        Claim.COMMON_SCALE,
        Claim.NON_CONFLICT,
        Claim.MIN_NORM,
    }
    at: ClassVar[Place] = "representation"  # type: ignore[misc]  # what makes it MGDA-UB is no setting

    @property
    @override
    def norm_power(self) -> float:
        return float(self.normalize)
