"""Signals: what sources provide and combiners need.

Legend: B sequences, T tokens, N objectives.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from torch import Tensor

from moa_lightning.functional.surrogate import is_clipped, probability_ratio, sequence_ratio


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
    KL_PENALTY = "kl_penalty"


MEANINGS = {
    Signal.ADVANTAGES: "one number per token and objective",
    Signal.SCORES: "one number per response and objective",
    Signal.RATIO: "policy over the policy that sampled, per token",
    Signal.WINS: "mean probability to win against the other responses to the prompt, per response and objective",
    Signal.GROUPS: "several responses to each prompt",
    Signal.PAIRS: "a loss that compares the responses to a prompt in pairs",
    Signal.SAMPLES: "responses of the policy itself, whose mean scores are its values",
    Signal.GRAMIAN: "inner products of the objectives' gradients",
    Signal.KL_PENALTY: "what a KL penalty in the reward takes off a response",
}


class GradientPlace(StrEnum):
    """Where the gradients of the Gram matrix are taken. Further down costs one backward pass for each objective."""

    REPRESENTATION = "representation"  # the last hidden state of every token: one pass through the head for all
    LAST_LAYER = "last_layer"  # trained parameters of the last block that has any
    PARAMETERS = "parameters"  # all trained parameters of the policy


SIGNALS_OF_LOSSES = frozenset({Signal.PAIRS})
"""What the loss provides, not the source."""


@dataclass(frozen=True)
class ClipRange:
    """What the surrogate of a loss does with the probability ratio; as it stands, nothing.

    Args:
        low: epsilon below 1.
        high: epsilon above 1.
        delta: bound of the ratio for negative advantages; ``None`` is no bound.
        of_responses: whether the ratio is that of a whole response, the geometric mean over its tokens.
    """

    low: float = float("inf")
    high: float = float("inf")
    delta: float | None = None
    of_responses: bool = False

    def ratio(self, logprobs_BT: Tensor, behaviour_logprobs_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """The ratio that the surrogate takes, for each token."""
        if self.of_responses:
            return sequence_ratio(logprobs_BT, behaviour_logprobs_BT, mask_BT).expand_as(logprobs_BT)
        return probability_ratio(logprobs_BT, behaviour_logprobs_BT)

    def is_flat(self, ratio: Tensor, advantages: Tensor) -> Tensor:
        """Bool: where the surrogate has no gradient."""
        return is_clipped(ratio, advantages, self.low, self.high, self.delta)


@dataclass
class Signals:
    """What a combiner reads of some rows. A field is None when its signal is not provided.

    The one record of evidence: ``observe`` gets all rows of a collected batch (``types.Experience``, which has these
    fields and more), ``combine`` those of a minibatch with the last three fields, which are of an update alone.
    """

    mask_BT: Tensor  # bool, tokens that are trained on (a row nobody could score, or left out when truncated: all 0)
    valid_BN: Tensor  # bool, objectives that could score the row
    advantages_BTN: Tensor | None = None  # float32
    scores_BN: Tensor | None = None  # float32, in the objectives' units after transform and penalties; 0 where invalid
    wins_BN: Tensor | None = None  # mean probability to win against the prompt's other responses; NaN where unknown
    group_B: Tensor | None = None  # int64, which prompt a row belongs to; None: each to one of its own
    log_prior_B: Tensor | None = None  # float32, log-weight of a row among those of its prompt; None is equal weights
    penalty_B: Tensor | None = None  # float32, taken off each of a response's scores (cut-off ones); None is nothing
    kl_penalty_B: Tensor | None = None  # float32, what a KL penalty in the reward takes off a response; None is nothing
    preference_BN: Tensor | None = None  # float32, the weights that the row was drawn under; None where none were
    # Of an update alone:
    ratio_BT: Tensor | None = None  # float32, detached; the one that the loss's surrogate takes
    clip_range: ClipRange | None = None  # of the surrogate that follows; None clips nothing
    gramian: Callable[[Tensor], Tensor] | None = (
        None  # surrogate slopes (B, T, N) -> Gram matrix (N, N), over all ranks, where the combiner asks for gradients
    )

    def unclipped(self, advantages_BTN: Tensor) -> Tensor:
        """``I(A)``: the advantage where the clipped surrogate has a gradient, 0 where it has none.

        Source: PAMA, arXiv 2508.07768. There the surrogate is flat where ``A > 0, u > 1+eps``; ``A < 0, u < 1-eps``
        arises only without Noon. The loss's other bounds (``epsilon_high``, ``delta``) count as well.
        """
        if self.ratio_BT is None or self.clip_range is None:
            return advantages_BTN
        flat_BTN = self.clip_range.is_flat(self.ratio_BT.unsqueeze(-1), advantages_BTN)
        return advantages_BTN.masked_fill(flat_BTN, 0.0)

    def slopes(self, advantages_BTN: Tensor) -> Tensor:
        """Derivative of each objective's surrogate by the log-probability of each token, up to a common factor.

        ``u I(A)`` of the token itself. Where the ratio is that of the response, each of its |y| tokens moves the
        surrogate of all: ``s / |y|`` times the mean of ``I(A)``, for the surrogate is a mean over tokens.
        """
        used_BTN = self.unclipped(advantages_BTN.where(self.present_BTN(), 0.0))
        if self.ratio_BT is None:
            return used_BTN
        if self.clip_range is not None and self.clip_range.of_responses:
            length_B11 = self.mask_BT.sum(1).clamp(min=1).to(used_BTN).reshape(-1, 1, 1)
            used_BTN = (used_BTN.sum(1, keepdim=True) / length_B11.square()).expand_as(used_BTN)
        return used_BTN * self.ratio_BT.unsqueeze(-1)

    def present_BTN(self) -> Tensor:
        """Bool: tokens that count, per objective that could score their row."""
        return self.mask_BT.unsqueeze(-1) & self.valid_BN.unsqueeze(1)
