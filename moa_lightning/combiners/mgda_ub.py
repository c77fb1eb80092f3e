"""MGDA-UB: the min-norm point of the gradients at the shared representation.

Legend: B sequences, T tokens, N objectives.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torchjd.aggregation import MGDAWeighting

from moa_lightning.combiners.base import Combined, Combiner
from moa_lightning.signals import Signal, Signals
from moa_lightning.types import State


@dataclass(frozen=True)
class MGDAUB(Combiner):
    """Train on the weighted sum whose gradient at the last hidden state has the smallest norm.

    ``min_c c'Gc`` over the simplex, G the Gram matrix of the N surrogate gradients at the shared representation,
    summed over all processes; solved by TorchJD. The weights then combine the advantages, and one ordinary
    backward pass follows.

    Source: Sener & Koltun, "Multi-Task Learning as Multi-Objective Optimization", 2018, arXiv 1810.04650. Deviation:
    the Gram matrix takes one backward pass through the head for all objectives, not one each (see
    ``functional.representation_gramian``; the result is the same).

    Args:
        normalize: divide each gradient by its norm first, so that an objective of large scale is not ignored
            (the norm's minimum goes to the shortest gradients).
        max_iters: iterations of the Frank-Wolfe solver.
        epsilon: step size below which it stops.
    """

    normalize: bool = False
    max_iters: int = 250
    epsilon: float = 1e-5

    needs: ClassVar[frozenset[Signal]] = frozenset({Signal.ADVANTAGES, Signal.RATIO, Signal.GRAMIAN})

    def __post_init__(self) -> None:
        """Refuse a solver that cannot run."""
        if self.max_iters < 1 or not self.epsilon > 0:
            raise ValueError("MGDAUB needs max_iters >= 1 and epsilon > 0")

    def combine(self, signals: Signals, state: State) -> Combined:
        """``sum_i c_i A_i`` per token, with c the min-norm weights of the Gram matrix."""
        assert signals.advantages_BTN is not None and signals.gramian is not None
        advantages_BTN = signals.advantages_BTN.where(signals.present_BTN(), 0.0)
        slopes_BTN = signals.unclipped(advantages_BTN)
        if signals.ratio_BT is not None:
            slopes_BTN = slopes_BTN * signals.ratio_BT.unsqueeze(-1)
        gram_NN = signals.gramian(slopes_BTN).double()
        norms_N = gram_NN.diagonal().sqrt()
        # An objective without gradient makes 0 the min-norm point; an all-zero row must not divide by 0 either.
        if self.normalize:
            gram_NN = gram_NN / norms_N.where(norms_N > 0, 1.0).outer(norms_N.where(norms_N > 0, 1.0))
        scale = gram_NN.diagonal().max().clamp(min=torch.finfo(torch.float64).tiny)
        weights_N = MGDAWeighting(epsilon=self.epsilon, max_iters=self.max_iters)(gram_NN / scale)
        if self.normalize:
            weights_N = weights_N / norms_N.where(norms_N > 0, 1.0)
            weights_N = weights_N / weights_N.sum()
        weights_N = weights_N.to(advantages_BTN.dtype)
        return Combined((advantages_BTN * weights_N).sum(-1), weights_N)
