"""The contract of a combiner: N signals in, one score out.

Three examples:

* ``Linear`` reads advantages and remembers its weights: ``combine`` is their weighted sum.
* ``PAMA`` reads advantages and ratios and remembers nothing: ``combine`` solves a closed form for each token.
* ``MOPO`` reads win probabilities and remembers multipliers: ``init`` starts them, ``observe`` moves them once per
  collected batch, and ``combine`` makes importance weights of them.

What a combiner may do besides (schedules, curves, evaluations, resuming, claims) are the hooks of ``hooks.py``.

Legend: B sequences, T tokens, N objectives.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moa_lightning.combiners.hooks import (
    FollowsSchedules,
    MakesClaims,
    ObservesEvaluations,
    ReportsCurves,
    Resumes,
    TakesGradients,
    TakesKLPenalty,
)
from moa_lightning.distributed import all_sum
from moa_lightning.signals import Signal, Signals
from moa_lightning.types import Experience, State


@dataclass(frozen=True)
class Combined:
    """The outcome of one combination."""

    score: Tensor  # (B, T) or (B,), detached: the advantage that the policy loss trains on
    weights: Tensor  # (B, T, N), (B, N) or (N,), the share that each objective got; all 0 where nothing counts
    # For losses on pairs of responses only, whose logit is (beta (D_i - D_j) - (margin_i - margin_j)) / weight:
    margin_B: Tensor | None = None
    weight: float = 1.0
    state: State | None = None  # the next one, where an update itself teaches something; None keeps the one before

    def mean_weights(self) -> Tensor:
        """``weights`` as ``(N,)``, for the logs: their mean over the tokens or rows that count, on all processes.

        All processes have to call it. Where nothing counts they are equal.
        """
        if self.weights.ndim == 1:
            return self.weights
        weights_KN = self.weights.flatten(0, -2)
        total = all_sum(torch.cat([weights_KN.sum(0), (weights_KN != 0).any(1).sum().reshape(1)]))
        mean_N = (total[:-1] / total[-1].clamp(min=1)).float()
        return mean_N.where(total[-1] > 0, 1 / len(mean_N))  # a branch would wait for the GPU


class Combiner(
    MakesClaims, TakesKLPenalty, TakesGradients, FollowsSchedules, ObservesEvaluations, ReportsCurves, Resumes, ABC
):
    """How N objectives become one. Subclasses are frozen dataclasses, validated in ``__post_init__``.

    A combiner holds configuration only. What it remembers lives in the state, which is passed in and returned:
    float32 tensors, identical on every rank, saved in the checkpoint.
    """

    needs: ClassVar[frozenset[Signal]]

    def init(self, objectives: Sequence[str], weights_N: Tensor) -> State:
        """First state, for the trained objectives in order and the weights that the user gave them.

        Raises:
            UserError: the configuration does not fit the objectives.
        """
        return {}

    def observe(self, experience: Experience, state: State) -> State:
        """State after a newly collected batch (duals, averages, ideal points). Called once per batch."""
        return state

    @abstractmethod
    def combine(self, signals: Signals, state: State) -> Combined:
        """One score from N signals. Pure; called once per optimiser step."""
