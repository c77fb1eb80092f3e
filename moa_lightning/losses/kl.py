"""KL penalties, which keep the policy near its reference: where they are applied, and how strongly.

* **In the loss** (``LossKL``): every loss adds :meth:`KLPenalty.loss`, whatever the combiner and source.
* **In the reward** (``RewardKL``): source ``Rollout``, which provides ``Signal.KL_PENALTY``, subtracts
  :func:`penalty_in_reward` from every objective's reward, so it is in the advantages. Combiners of responses' scores
  subtract ``kl_penalty_B`` from their combined score. Combiners of win probabilities do neither
  (:func:`penalty_reaches_score`).
* **Strength**: :meth:`KLPenalty.reward_coefficient` per nat; ``Experience.kl_coefficient`` is that of a collected
  batch. A combiner that needs ``Signal.KL_PENALTY`` (``CAID``) works only with one above 0.

Legend: B sequences, T tokens.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from moa_lightning.combiners.base import Combiner
from moa_lightning.errors import UserError
from moa_lightning.functional.surrogate import squared_log_ratio
from moa_lightning.signals import Signal
from moa_lightning.types import State


def penalty_in_reward(log_ratio_BT: Tensor, coefficient: float) -> tuple[Tensor, Tensor]:
    """Penalty in the reward, for each token and for each response.

    Args:
        log_ratio_BT: ``log pi - log pi_ref`` under the policy that sampled, 0 on padding.
        coefficient: penalty per nat.

    Returns:
        ``(penalty_BT, penalty_B)``.
    """
    return coefficient * log_ratio_BT, coefficient * log_ratio_BT.sum(1)


def penalty_reaches_score(combiner: Combiner, provided: frozenset[Signal]) -> bool:
    """Whether a penalty in the reward affects the training, with a source that provides these signals."""
    return Signal.KL_PENALTY in provided and combiner.takes_kl_penalty


class KLPenalty(ABC):
    """Penalises the divergence from the reference, in the rewards or in the loss."""

    def init(self) -> State:
        """The initial state."""
        return {}

    def observe(self, kl: float, sequences: int, state: State) -> State:
        """Update the state after a collected batch.

        Args:
            kl: mean per sequence, in nats, over all processes.
            sequences: number of sequences over all processes.
            state: before the batch.
        """
        return state

    @abstractmethod
    def reward_coefficient(self, state: State) -> float:
        """Penalty per nat, subtracted from every objective's reward at each token; 0 does not change the reward."""

    @abstractmethod
    def loss(self, logprobs_BT: Tensor, reference_logprobs_BT: Tensor) -> Tensor:
        """Penalty per token (B, T), added to the loss, with gradient."""


@dataclass(frozen=True)
class RewardKL(KLPenalty):
    """KL in the reward, with a coefficient that adapts towards a target.

    The penalty of each token is the coefficient times ``log pi - log pi_ref``, with the policy that sampled. It is
    subtracted from every objective's reward. It is linear in the log-probabilities, so it cannot overflow.

    Source: Ziegler et al. 2019, arXiv 1909.08593, section 2.2; target 3 and coefficient 0.2 are those of PAMA
    (arXiv 2508.07768). Deviation: the coefficient is multiplied by ``exp(error * sequences / horizon)`` instead of
    ``1 + error * sequences / horizon``, and a batch counts as at most ``horizon`` sequences. For small batches the two
    agree to first order. For large ones the paper's factor becomes negative, and a larger gain overshoots the target.

    Args:
        init_kl_coef: the initial coefficient; 0 is no penalty.
        target: mean KL per sequence, in nats, that the coefficient is adapted to; ``None`` keeps it constant.
        horizon: sequences over which the coefficient reacts.
    """

    init_kl_coef: float = 0.2
    target: float | None = 3.0
    horizon: float = 10_000.0

    def __post_init__(self) -> None:
        if not 0 <= self.init_kl_coef < math.inf:
            raise UserError(f"RewardKL needs a finite init_kl_coef >= 0, got {self.init_kl_coef}")
        if self.target is not None and not 0 < self.target < math.inf:
            raise UserError(f"RewardKL needs a finite target > 0 (or null), got {self.target}")
        if not 0 < self.horizon < math.inf:
            raise UserError(f"RewardKL needs a finite horizon > 0, got {self.horizon}")

    @override
    def init(self) -> State:
        return {"kl_coefficient": torch.tensor(self.init_kl_coef)}

    def observe(self, kl: float, sequences: int, state: State) -> State:
        """Update the coefficient by proportional control in log space, with the error clipped to +-0.2."""
        if self.target is None:
            return state
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        coefficient = state["kl_coefficient"] * math.exp(error * min(sequences / self.horizon, 1.0))
        # Float32 would round a long decay to 0, from which no factor can recover.
        smallest = torch.finfo(coefficient.dtype).tiny if self.init_kl_coef > 0 else 0.0
        return {"kl_coefficient": coefficient.clamp(min=smallest)}

    @override
    def reward_coefficient(self, state: State) -> float:
        return float(state["kl_coefficient"])

    @override
    def loss(self, logprobs_BT: Tensor, reference_logprobs_BT: Tensor) -> Tensor:
        return torch.zeros_like(logprobs_BT)


@dataclass(frozen=True)
class LossKL(KLPenalty):
    """KL in the loss: ``beta (log pi - log pi_ref)^2 / 2`` per token, which cannot overflow.

    Source: "k2" in Schulman 2020, "Approximating KL divergence"; as a loss its gradient is that of the KL divergence
    on samples of the policy.

    Args:
        beta: coefficient.
    """

    beta: float = 0.05

    def __post_init__(self) -> None:
        if not 0 <= self.beta < math.inf:
            raise UserError(f"LossKL needs a finite beta >= 0, got {self.beta}")

    @override
    def reward_coefficient(self, state: State) -> float:
        return 0.0

    @override
    def loss(self, logprobs_BT: Tensor, reference_logprobs_BT: Tensor) -> Tensor:
        return self.beta * squared_log_ratio(logprobs_BT, reference_logprobs_BT)
