"""GAPO: the min-norm point of rescaled gradients.

Legend: N objectives.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from typing_extensions import override

from moa_lightning.combiners.claims import CONVEX, Claim
from moa_lightning.combiners.shared.gradients import MinNorm, Place


@dataclass(frozen=True)
class GAPO(MinNorm):
    """Train on the min-norm combination of gradients that were divided by a power of their norm.

    MGDA by itself follows the objective with the shortest gradient; scaled, it follows none for its length
    (``power`` 1), or the others all the more (``power`` 2). The direction is ``sum_i c_i g_i / |g_i|^power`` with c the
    min-norm point of the scaled gradients, by TorchJD.

    Choose it when: no objective may get worse, you have no weights, and gradients differ in length.
    Cost: as ``at`` says: one backward pass through the head, or N.
    Convergence: stated, towards a Pareto-optimal solution.
    Source: Li et al., "Gradient-Adaptive Policy Optimization", ACL 2025, arXiv 2507.01915. Deviations: gradients at
    the representation unless ``at`` says otherwise; the weights are divided by their sum; an objective without
    gradient is left out.

    Formula: ``A = sum_i a_i A_i / sum_i a_i`` with ``a_i = c_i / |g_i|^p`` and ``c = argmin c'Gc`` over the simplex,
    ``G_ij = g_i . g_j / (|g_i| |g_j|)^p``.
    Symbols: ``p`` is ``power``; ``a``, divided by its sum, is ``weights/<name>`` in the logs; ``g_i`` is the gradient
    of objective i's surrogate where ``at`` says.
    Missing score: adds 0 there, to the gradient as well; without any score in a minibatch its weight is 0.
    Watch: ``weights/<name>``: they follow the gradients' lengths, not their importance; one near 0 for long is an
    objective whose gradient is long, or one that others already improve.

    Args:
        power: of the norm that each gradient is divided by.
        at: where gradients are taken: ``representation``, ``last_layer`` or all trained ``parameters``.
        max_iters: iterations of the Frank-Wolfe solver, at most. So many come near for a few objectives; 16 take
            thousands to the shortest direction, though without conflict it is before.
        epsilon: step size below which it stops.
    """

    power: Literal[1, 2] = 1
    at: Place = "representation"
    max_iters: int = 250
    epsilon: float = 1e-5

    claims: ClassVar[frozenset[Claim]] = CONVEX | {
        Claim.ONE_OBJECTIVE,
        Claim.COMMON_SCALE,
        Claim.NON_CONFLICT,
        Claim.MIN_NORM,
    }

    @property
    @override
    def norm_power(self) -> float:
        return float(self.power)
