"""What the combiners of whole responses' scores share: a baseline, and the scale of the batch.

Legend: B sequences, N objectives.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from moa_lightning.combiners.base import Combined, Combiner
from moa_lightning.combiners.shared.responses import ScoredResponses, scored_responses
from moa_lightning.combiners.shared.weighted import Weighted
from moa_lightning.distributed import all_sum
from moa_lightning.functional.scalarize import NO_SPREAD, group_centered
from moa_lightning.signals import Signal, Signals
from moa_lightning.types import Experience, State


class ResponseCombiner(Combiner):
    """One score for each whole response, turned into an advantage. There is no such thing as its score of a token.

    A constant on all scores would add noise to the policy gradient and nothing else, so a baseline is taken off: the
    mean over the responses to the same prompt, because prompts differ in how well they can be answered at all; for a
    response that is the only one of its prompt, the mean over the batch. What is left is divided by its standard
    deviation over the collected batch, one positive number over all processes and minibatches, which changes no
    direction.
    """

    needs: ClassVar[frozenset[Signal]] = frozenset({Signal.SCORES})
    lacks: ClassVar[dict[str, str]] = {
        "granularity": "its score is one of whole responses, and tokens have none; PAMA and Linear combine per token"
    }
    """Fields that somebody may look for, and why there are none."""

    @property
    def takes_kl_penalty(self) -> bool:
        """True: off the combined score."""
        return True

    def init(self, objectives: Sequence[str], weights_N: Tensor) -> State:
        """No baseline, and a scale of 1."""
        return {"mean": weights_N.new_zeros(()), "spread": weights_N.new_ones(())}

    def observe(self, experience: Experience, state: State) -> State:
        """Mean and spread of the collected batch, over all processes."""
        responses = scored_responses(experience)
        state = self.learn(responses, state)
        score_B, shares_BN = self._penalised(responses, state)
        counted_B = shares_BN.sum(1) > 0
        total, squares, count = all_sum(
            torch.stack([score_B.sum(), score_B.square().sum(), counted_B.double().sum()])
        ).tolist()
        if count == 0:
            return state
        mean = total / count
        squared = float(all_sum(group_centered(score_B, counted_B, responses.group_B, mean).square().sum()))
        varies = squared > NO_SPREAD**2 * squares
        spread = (squared / count) ** 0.5 if varies else torch.inf  # infinite: there is nothing to tell apart
        like = state["mean"]
        return state | {"mean": torch.full_like(like, mean), "spread": torch.full_like(like, spread)}

    def learn(self, responses: ScoredResponses, state: State) -> State:
        """State after a collected batch, for what a subclass remembers of it."""
        return state

    @abstractmethod
    def scalarize(self, responses: ScoredResponses, weights_N: Tensor, state: State) -> tuple[Tensor, Tensor]:
        """``(score_B, shares_BN)``; the shares of a response add to 1, or are all 0 where it does not count."""

    def combine(self, signals: Signals, state: State) -> Combined:
        """The combined score less its baseline, in standard deviations of the batch."""
        advantages_B, shares_BN = self.advantages(scored_responses(signals), state)
        return Combined(advantages_B.float(), shares_BN)

    def advantages(self, responses: ScoredResponses, state: State) -> tuple[Tensor, Tensor]:
        """``(advantages_B, shares_BN)``: the signal that is trained on, float64."""
        score_B, shares_BN = self._penalised(responses, state)
        centred_B = group_centered(score_B, shares_BN.sum(1) > 0, responses.group_B, float(state["mean"]))
        return centred_B / float(state["spread"]), shares_BN

    def _penalised(self, responses: ScoredResponses, state: State) -> tuple[Tensor, Tensor]:
        weights_N = state["weights"].to(responses.scores_BN)
        score_B, shares_BN = self.scalarize(responses, weights_N, state)
        if responses.kl_penalty_B is not None:
            score_B = score_B - responses.kl_penalty_B
        return score_B.where(shares_BN.sum(1) > 0, 0.0), shares_BN


class ScoreCombiner(Weighted, ResponseCombiner):
    """The combiners of whole responses' scores whose objectives have weights."""

    def init(self, objectives: Sequence[str], weights_N: Tensor) -> State:
        """Weights by name; no baseline, and a scale of 1."""
        return Weighted.init(self, objectives, weights_N) | ResponseCombiner.init(self, objectives, weights_N)
