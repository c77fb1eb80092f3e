"""Signals: what sources provide and combiners need.

Legend: B sequences, T tokens, N objectives.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from torch import Tensor

from moa_lightning.functional.surrogate import is_clipped, probability_ratio, sequence_ratio


class Signal(StrEnum):
    """The kinds of signals. A combiner declares those that it reads; the source must provide them."""

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
    """The place in the model where the Gram matrix's gradients are taken.

    All but the first cost one backward pass for each objective.
    """

    REPRESENTATION = "representation"  # the last hidden state of every token: one pass through the head for all
    LAST_LAYER = "last_layer"  # trained parameters of the last block that has any
    PARAMETERS = "parameters"  # all trained parameters of the policy


SIGNALS_OF_LOSSES = frozenset({Signal.PAIRS})
"""Signals that the loss provides, not the source."""


@dataclass(frozen=True)
class ClipRange:
    """How the surrogate of a loss clips the probability ratio; by default it does not.

    Args:
        low: epsilon below 1.
        high: epsilon above 1.
        delta: bound of the ratio for negative advantages; ``None`` is no bound.
        of_responses: whether the ratio is that of a response, the geometric mean over its tokens.
    """

    low: float = float("inf")
    high: float = float("inf")
    delta: float | None = None
    of_responses: bool = False

    def ratio(self, logprobs_BT: Tensor, behaviour_logprobs_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """The ratio that the surrogate uses for each token."""
        if self.of_responses:
            return sequence_ratio(logprobs_BT, behaviour_logprobs_BT, mask_BT).expand_as(logprobs_BT)
        return probability_ratio(logprobs_BT, behaviour_logprobs_BT)

    def is_flat(self, ratio: Tensor, advantages: Tensor) -> Tensor:
        """Bool: where the surrogate has no gradient."""
        return is_clipped(ratio, advantages, self.low, self.high, self.delta)


@dataclass
class Signals:
    """The signals of some rows that a combiner reads. A field is None if its signal is not provided.

    ``observe`` gets all rows of a collected batch (``types.Experience``, which extends this record). ``combine`` gets
    those of a minibatch, with the last three fields, which exist only during an update.
    """

    mask_BT: Tensor  # bool, tokens to train on (all False for a row without scores, or truncated and masked)
    valid_BN: Tensor  # bool, whether the objective has a score for the row
    advantages_BTN: Tensor | None = None  # float32
    scores_BN: Tensor | None = None  # float32, in the objectives' units after transform and penalties; 0 where invalid
    wins_BN: Tensor | None = None  # mean probability to win against the prompt's other responses; NaN where unknown
    group_B: Tensor | None = None  # int64, index of the row's prompt; None: no two rows share a prompt
    log_prior_B: Tensor | None = None  # float32, log-weight of a row among its prompt's rows; None: equal weights
    penalty_B: Tensor | None = None  # float32, subtracted from all scores of a truncated response; None: nothing
    kl_penalty_B: Tensor | None = None  # float32, KL penalty of a response in its reward; None: nothing
    preference_BN: Tensor | None = None  # float32, the weights that the row was sampled for; None: no such weights
    # Only during an update:
    ratio_BT: Tensor | None = None  # float32, detached; the ratio that the loss's surrogate uses
    clip_range: ClipRange | None = None  # of the loss's surrogate; None: no clipping
    gramian: Callable[[Tensor], Tensor] | None = None  # surrogate slopes (B, T, N) -> Gram matrix (N, N) over all ranks

    def unclipped(self, advantages_BTN: Tensor) -> Tensor:
        """``I(A)``: the advantage where the clipped surrogate has a gradient, 0 where it has none.

        Source: PAMA, arXiv 2508.07768. There the surrogate is flat where ``A > 0, u > 1+eps``; ``A < 0, u < 1-eps``
        occurs only without Noon. The loss's other bounds (``epsilon_high``, ``delta``) apply too.
        """
        if self.ratio_BT is None or self.clip_range is None:
            return advantages_BTN
        flat_BTN = self.clip_range.is_flat(self.ratio_BT.unsqueeze(-1), advantages_BTN)
        return advantages_BTN.masked_fill(flat_BTN, 0.0)

    def slopes(self, advantages_BTN: Tensor) -> Tensor:
        """Derivative of each objective's surrogate by the log-probability of each token, up to a common factor.

        It is ``u I(A)`` of the token. If the ratio is that of the response, each of its |y| tokens changes the
        surrogate of all: then it is ``s / |y|`` times the mean of ``I(A)``, as the surrogate is a mean over tokens.
        """
        used_BTN = self.unclipped(advantages_BTN.where(self.present_BTN(), 0.0))
        if self.ratio_BT is None:
            return used_BTN
        if self.clip_range is not None and self.clip_range.of_responses:
            length_B11 = self.mask_BT.sum(1).clamp(min=1).to(used_BTN).reshape(-1, 1, 1)
            used_BTN = (used_BTN.sum(1, keepdim=True) / length_B11.square()).expand_as(used_BTN)
        return used_BTN * self.ratio_BT.unsqueeze(-1)

    def present_BTN(self) -> Tensor:
        """Bool: tokens to train on, for each objective that has a score for their row."""
        return self.mask_BT.unsqueeze(-1) & self.valid_BN.unsqueeze(1)
