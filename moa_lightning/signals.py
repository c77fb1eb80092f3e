"""Signals: what sources provide and combiners need.

Legend: B sequences, T tokens, N objectives.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from torch import Tensor


class Signal(StrEnum):
    """The kinds of evidence. A combiner names those it reads; the source must provide them."""

    ADVANTAGES = "advantages"
    SCORES = "scores"
    RATIO = "ratio"
    WINS = "wins"
    GROUPS = "groups"  # no tensor of its own: group_B is always given
    PAIRS = "pairs"  # no tensor of its own
    SAMPLES = "samples"  # no tensor of its own
    GRAMIAN = "gramian"


MEANINGS = {
    Signal.ADVANTAGES: "one number per token and objective",
    Signal.SCORES: "one number per response and objective",
    Signal.RATIO: "policy over the policy that sampled, per token",
    Signal.WINS: "mean probability to win against the other responses to the prompt, per response and objective",
    Signal.GROUPS: "several responses to each prompt",
    Signal.PAIRS: "a loss that compares the responses to a prompt in pairs",
    Signal.SAMPLES: "responses of the policy itself, whose mean scores are its values",
    Signal.GRAMIAN: "inner products of the objectives' gradients",
}


class GradientPlace(StrEnum):
    """Where the gradients of the Gram matrix are taken. Further down costs one backward pass for each objective."""

    REPRESENTATION = "representation"  # the last hidden state of every token: one pass through the head for all
    LAST_LAYER = "last_layer"  # trained parameters of the last block that has any
    PARAMETERS = "parameters"  # all trained parameters of the policy


SIGNALS_OF_LOSSES = frozenset({Signal.PAIRS})
"""What the loss provides, not the source."""


@dataclass(frozen=True)
class Signals:
    """N signals for one update. A field is None when its signal is not provided."""

    mask_BT: Tensor  # bool, tokens that count
    valid_BN: Tensor  # bool, objectives that could score the row
    advantages_BTN: Tensor | None = None  # float32
    scores_BN: Tensor | None = None  # float32, in the objectives' units after transform and penalties; 0 where invalid
    ratio_BT: Tensor | None = None  # float32, detached
    wins_BN: Tensor | None = None  # float32, in [0, 1]; NaN where unknown
    group_B: Tensor | None = None  # int64, which prompt a row belongs to; None: each to one of its own
    penalty_B: Tensor | None = None  # float32, taken off each of a response's scores (cut-off ones); None is nothing
    charge_B: Tensor | None = None  # float32, what a KL penalty in the reward takes off a response; None is nothing
    log_prior_B: Tensor | None = None  # float32, log-weight of a row among those of its prompt; None is equal weights
    clip_range: float = float("inf")  # the epsilon of the clipped surrogate that follows
    gramian: Callable[[Tensor], Tensor] | None = (
        None  # surrogate slopes (B, T, N) -> Gram matrix (N, N), over all ranks, where the combiner asks for gradients
    )

    def unclipped(self, advantages_BTN: Tensor) -> Tensor:
        """``I(A)``: the advantage where the clipped surrogate has a gradient, 0 where it has none.

        The surrogate ``min(u A, clip(u, 1-eps, 1+eps) A)`` is flat where ``A > 0, u > 1+eps`` and where
        ``A < 0, u < 1-eps``. Source: PAMA, arXiv 2508.07768; the second case arises only without Noon.
        """
        if self.ratio_BT is None:
            return advantages_BTN
        ratio_BT1 = self.ratio_BT.unsqueeze(-1)
        flat_BTN = ((advantages_BTN > 0) & (ratio_BT1 > 1 + self.clip_range)) | (
            (advantages_BTN < 0) & (ratio_BT1 < 1 - self.clip_range)
        )
        return advantages_BTN.masked_fill(flat_BTN, 0.0)

    def present_BTN(self) -> Tensor:
        """Bool: tokens that count, per objective that could score their row."""
        return self.mask_BT.unsqueeze(-1) & self.valid_BN.unsqueeze(1)
