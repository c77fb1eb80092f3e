"""PAMA: closed-form multi-objective alignment.

Legend: B sequences, T tokens, N objectives.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from moa_lightning.combiners.base import Combined, Combiner
from moa_lightning.distributed import all_sum
from moa_lightning.functional.pama import pama
from moa_lightning.signals import Signal, Signals
from moa_lightning.types import State


class Granularity(ABC):
    """What shares one set of weights in PAMA."""

    @abstractmethod
    def weigh(self, effective_BTN: Tensor, present_BTN: Tensor) -> Tensor:
        """Weights, broadcastable to ``(B, T, N)``, from ``I(A)`` and from which of its entries count."""


@dataclass(frozen=True)
class Token(Granularity):
    """One problem per token: the paper's bound, read literally."""

    def weigh(self, effective_BTN: Tensor, present_BTN: Tensor) -> Tensor:
        """Theorem 1 on each token's N advantages."""
        return pama(effective_BTN, valid=present_BTN)[1]


@dataclass(frozen=True)
class Sequence(Granularity):
    """One problem per response, on the mean over its tokens."""

    def weigh(self, effective_BTN: Tensor, present_BTN: Tensor) -> Tensor:
        """Theorem 1 on each response's N mean advantages."""
        count_BN = present_BTN.sum(1)
        mean_BN = effective_BTN.where(present_BTN, 0.0).sum(1) / count_BN.clamp(min=1)
        return pama(mean_BN, valid=count_BN > 0)[1].unsqueeze(1)


@dataclass(frozen=True)
class Batch(Granularity):
    """One problem per update, on the mean over all tokens of all processes: the published implementation's."""

    def weigh(self, effective_BTN: Tensor, present_BTN: Tensor) -> Tensor:
        """Theorem 1 on the N mean advantages of the whole batch."""
        total_N = all_sum(effective_BTN.where(present_BTN, 0.0).sum((0, 1)))
        count_N = all_sum(present_BTN.sum((0, 1)).to(total_N.dtype))
        return pama(total_N / count_N.clamp(min=1), valid=count_N > 0)[1]


@dataclass(frozen=True)
class PAMA(Combiner):
    """Train on the min-norm point of the N advantages, in closed form.

    Instead of the norm of the combined gradient (MGDA, O(N^2 d)) PAMA minimises an upper bound of it that only
    needs the N advantages: ``min_c (sum_i c_i I(A_i))^2`` over the simplex, solved in O(N) by Theorem 1.

    Source: He & Maghsudi, "Pareto Multi-Objective Alignment for Language Models", ECML-PKDD 2025, arXiv
    2508.07768. Deviations: the granularity is an option, because the paper's bound is per token while its published
    implementation solves once per batch; objectives that could not score a response are left out of its problem;
    without Noon, ``I(A)`` also drops the part that the surrogate clips for negative advantages.

    Known limit: with Noon and ``Token`` or ``Sequence``, a token counts only where it is better than average for
    *every* objective, so a policy that would have to mix specialists stalls. Without Noon it does not.

    Args:
        granularity: ``Token``, ``Sequence`` or ``Batch``: what shares one set of weights.
        noon: replace each advantage by its positive part first ("no negative", the paper's choice). Without it,
            the sign is kept and all three branches of Theorem 1 are used.
    """

    granularity: Granularity = field(default_factory=Token)
    noon: bool = True

    needs: ClassVar[frozenset[Signal]] = frozenset({Signal.ADVANTAGES, Signal.RATIO})

    def combine(self, signals: Signals, state: State) -> Combined:
        """``sum_i c_i A_i`` per token, with c from Theorem 1 on ``I(A)``."""
        assert signals.advantages_BTN is not None
        present_BTN = signals.present_BTN()
        advantages_BTN = signals.advantages_BTN.where(present_BTN, 0.0)
        if self.noon:
            advantages_BTN = advantages_BTN.clamp(min=0)
        weights_BTN = self.granularity.weigh(signals.unclipped(advantages_BTN), present_BTN).expand_as(advantages_BTN)
        score_BT = (weights_BTN * advantages_BTN).sum(-1)
        counted_BT1 = present_BTN.any(-1, keepdim=True)
        total = all_sum(torch.cat([(weights_BTN * counted_BT1).sum((0, 1)), counted_BT1.sum().reshape(1)]))
        return Combined(score_BT, total[:-1] / total[-1].clamp(min=1))
