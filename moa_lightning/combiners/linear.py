"""Linear scalarisation: fixed weights (MORLHF).

Legend: B sequences, T tokens, N objectives.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from moa_lightning.combiners.base import Combined
from moa_lightning.combiners.claims import CONVEX, Claim
from moa_lightning.combiners.shared.weighted import Weighted
from moa_lightning.schedules import Weight
from moa_lightning.signals import Signal, Signals
from moa_lightning.types import State


@dataclass(frozen=True)
class Linear(Weighted):
    """Train on the weighted sum of the objectives' advantages.

    Choose it when: you know your weights; and as the baseline that any other method has to beat.
    Cost: no extra backward pass.
    Convergence: that of policy gradient on one fixed reward; no weights reach a concave part of the front.
    Source: MORLHF as in Bai et al. 2022, arXiv 2204.05862, and the baselines of PAMA (arXiv 2508.07768).
    Deviation: an objective that could not score a response adds 0 there; the other weights stay as they are.

    Formula: ``A = sum_i w_i A_i`` for each token, with ``sum_i w_i = 1``.
    Symbols: ``w`` is ``weights``; ``A_i`` is ``advantages_BTN[..., i]``.
    Missing score: adds 0 there; the other weights stay as they are.
    Watch: ``val/rewards/<name>/mean``: an objective that falls pays for the others, so raise its weight.

    Args:
        weights: weight of each objective by name, non-negative, not all 0; divided by their sum. ``None`` takes
            the ``weight`` of each objective.
    """

    weights: dict[str, Weight] | None = None

    needs: ClassVar[frozenset[Signal]] = frozenset({Signal.ADVANTAGES})
    claims: ClassVar[frozenset[Claim]] = CONVEX | {Claim.ONE_OBJECTIVE, Claim.COMMON_SCALE}

    def combine(self, signals: Signals, state: State) -> Combined:
        """``sum_i w_i A_i`` per token."""
        assert signals.advantages_BTN is not None
        weights_N = state["weights"].to(signals.advantages_BTN.device)
        score_BT = (signals.advantages_BTN.where(signals.valid_BN.unsqueeze(1), 0.0) * weights_N).sum(-1)
        return Combined(torch.where(signals.mask_BT, score_BT, 0.0), weights_N)
