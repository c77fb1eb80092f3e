"""PAMA: closed-form multi-objective alignment.

Legend: B sequences, T tokens, N objectives.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor
from typing_extensions import override

from moa_lightning.combiners.base import Combined, Combiner
from moa_lightning.combiners.claims import Claim
from moa_lightning.distributed import all_sum
from moa_lightning.errors import UserError
from moa_lightning.functional.pama import pama
from moa_lightning.signals import Signal, Signals
from moa_lightning.types import State

Granularity = Literal["token", "sequence", "batch"]
"""What shares one set of weights in PAMA."""


def _per_token(effective_BTN: Tensor, present_BTN: Tensor) -> Tensor:
    return pama(effective_BTN, valid=present_BTN)[1]


def _per_sequence(effective_BTN: Tensor, present_BTN: Tensor) -> Tensor:
    count_BN = present_BTN.sum(1)
    mean_BN = effective_BTN.where(present_BTN, 0.0).sum(1) / count_BN.clamp(min=1)
    return pama(mean_BN, valid=count_BN > 0)[1].unsqueeze(1)


def _per_batch(effective_BTN: Tensor, present_BTN: Tensor) -> Tensor:
    total_N = all_sum(effective_BTN.where(present_BTN, 0.0).sum((0, 1)))
    count_N = all_sum(present_BTN.sum((0, 1)).to(total_N.dtype))
    return pama(total_N / count_N.clamp(min=1), valid=count_N > 0)[1]


_WEIGHTS: dict[Granularity, Callable[[Tensor, Tensor], Tensor]] = {
    "token": _per_token,
    "sequence": _per_sequence,
    "batch": _per_batch,
}


@dataclass(frozen=True)
class PAMA(Combiner):
    """Train on the min-norm point of the N advantages, in closed form.

    Instead of the norm of the combined gradient (MGDA, O(N^2 d)) PAMA minimises an upper bound of it that only
    needs the N advantages: ``min_c (sum_i c_i I(A_i))^2`` over the simplex, solved in O(N) by Theorem 1.

    Choose it when: you have neither weights nor thresholds.
    Cost: O(N) for each token; no extra backward pass.
    Convergence: stated, to a Pareto-stationary point, for Lipschitz gradients, bounded rewards and small steps.
    Source: He & Maghsudi, "Pareto Multi-Objective Alignment for Language Models", ECML-PKDD 2025, arXiv
    2508.07768. Deviations: the granularity is an option, because the paper's bound is per token while its published
    implementation solves once per batch; objectives that could not score a response are left out of its problem;
    without Noon, ``I(A)`` also drops the part that the surrogate clips for negative advantages.

    Known limit: with Noon and weights per token or sequence, a token counts only where it is better than average for
    *every* objective, so a policy that would have to mix specialists stalls. Without Noon it does not.

    Formula: ``A = sum_i c_i A_i`` with ``c = argmin (sum_i c_i I(A_i))^2`` over the simplex. In closed form (Theorem
    1): all ``I(A_i)`` above 0, c is 1 at the smallest; all below 0, c is 1 at the largest; otherwise the largest M and
    the smallest m share, ``c_m = M / (M - m)`` and ``c_M = -m / (M - m)``. Ties share equally.
    Symbols: ``c`` is ``weights/<name>`` in the logs; ``I(A)`` is ``Signals.unclipped``, the advantage where the
    surrogate is not clipped and 0 elsewhere; Noon's ``max(A, 0)`` is ``noon``.
    Missing score: is left out of the problem there, so the others share its weight.
    Watch: ``score/mean`` near 0 with Noon: hardly any token is better than average for every objective, so try ``noon:
    false``. ``weights/<name>`` at 1 for one objective with ``granularity: batch``: the run drifts to it.

    Args:
        granularity: what shares one set of weights: each ``token`` (the paper's bound, read literally), each
            ``sequence`` (on the mean over its tokens) or the ``batch`` (on the mean over all tokens of all processes,
            as in the published implementation).
        noon: replace each advantage by its positive part first ("no negative", the paper's choice). Without it,
            the sign is kept and all three branches of Theorem 1 are used.
    """

    granularity: Granularity = "token"
    noon: bool = True

    needs: ClassVar[frozenset[Signal]] = frozenset({Signal.ADVANTAGES, Signal.RATIO})
    claims: ClassVar[frozenset[Claim]] = frozenset({Claim.SIMPLEX, Claim.PERMUTATION, Claim.COMMON_SCALE})

    def __post_init__(self) -> None:
        if self.granularity not in _WEIGHTS:
            raise UserError(f"PAMA.granularity must be one of {', '.join(_WEIGHTS)}; got '{self.granularity}'")

    @property
    def claimed(self) -> frozenset[Claim]:
        """More where weights are those of a token or of all of them, and where signs are kept."""
        more = {Claim.MONOTONE: self.granularity != "sequence", Claim.NON_CONFLICT: self.granularity == "token"}
        more[Claim.ONE_OBJECTIVE] = not self.noon
        return self.claims | {claim for claim, holds in more.items() if holds}

    @property
    @override
    def gives_weights(self) -> bool:
        return self.noon

    def combine(self, signals: Signals, state: State) -> Combined:
        """``sum_i c_i A_i`` per token, with c from Theorem 1 on ``I(A)``."""
        assert signals.advantages_BTN is not None
        present_BTN = signals.present_BTN()
        advantages_BTN = signals.advantages_BTN.where(present_BTN, 0.0)
        if self.noon:
            advantages_BTN = advantages_BTN.clamp(min=0)
        weights_BTN = _WEIGHTS[self.granularity](signals.unclipped(advantages_BTN), present_BTN)
        weights_BTN = weights_BTN.expand_as(advantages_BTN)
        score_BT = (weights_BTN * advantages_BTN).sum(-1)
        return Combined(score_BT, weights_BTN * present_BTN.any(-1, keepdim=True))
