"""Linear scalarisation: fixed weights (MORLHF).

Legend: B sequences, T tokens, N objectives.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moa_lightning.combiners.base import Combined, Combiner
from moa_lightning.combiners.weights import named_weights
from moa_lightning.signals import Signal, Signals
from moa_lightning.types import State


@dataclass(frozen=True)
class Linear(Combiner):
    """Train on the weighted sum of the objectives' advantages.

    Source: MORLHF as in Bai et al. 2022, arXiv 2204.05862, and the baselines of PAMA (arXiv 2508.07768).
    Deviation: an objective that could not score a response adds 0 there; the other weights stay as they are.

    Args:
        weights: weight of each objective by name, non-negative, not all 0; divided by their sum. ``None`` takes
            the ``weight`` of each objective.
    """

    weights: dict[str, float] | None = None

    needs: ClassVar[frozenset[Signal]] = frozenset({Signal.ADVANTAGES})

    def init(self, objectives: Sequence[str], weights_N: Tensor) -> State:
        """Check the weights against the objectives and normalise them."""
        return {"weights": named_weights(self.weights, objectives, weights_N)}

    def resume(self, saved: State, fresh: State) -> State:
        """The configuration's weights."""
        return fresh

    def combine(self, signals: Signals, state: State) -> Combined:
        """``sum_i w_i A_i`` per token."""
        assert signals.advantages_BTN is not None
        weights_N = state["weights"].to(signals.advantages_BTN.device)
        score_BT = (signals.advantages_BTN.where(signals.valid_BN.unsqueeze(1), 0.0) * weights_N).sum(-1)
        return Combined(torch.where(signals.mask_BT, score_BT, 0.0), weights_N)
