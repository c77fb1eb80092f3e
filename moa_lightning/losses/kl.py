"""How the policy is held near its reference.

Legend: B sequences, T tokens.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from moa_lightning.errors import UserError
from moa_lightning.functional.surrogate import squared_log_ratio
from moa_lightning.types import State


class KLPenalty(ABC):
    """Where and how strongly the divergence from the reference is charged."""

    def init(self) -> State:
        """First state."""
        return {}

    def observe(self, kl: float, sequences: int, state: State) -> State:
        """State after a collected batch with this mean KL per sequence (nats), over all processes."""
        return state

    @abstractmethod
    def reward_coefficient(self, state: State) -> float:
        """Charge per nat, subtracted from every objective's reward at each token."""

    @abstractmethod
    def loss(self, logprobs_BT: Tensor, reference_logprobs_BT: Tensor) -> Tensor:
        """Charge per token, added to the loss, with gradient."""


@dataclass(frozen=True)
class RewardKL(KLPenalty):
    """KL in the reward, with a coefficient that adapts towards a target.

    Each token's ``log pi - log pi_ref`` under the policy that sampled is charged to every objective: linear in the
    log-probabilities, so it cannot overflow.

    Source: Ziegler et al. 2019, arXiv 1909.08593, section 2.2; target 3 and coefficient .2 are those of PAMA
    (arXiv 2508.07768). Deviation: the coefficient is multiplied by ``exp(error * sequences / horizon)`` in place of
    ``1 + error * sequences / horizon``, and a batch counts as ``horizon`` sequences at most. For small batches the two
    agree to first order; for large ones the paper's factor turns negative, and a larger gain overshoots the target.

    Args:
        init_kl_coef: the coefficient at the start; 0 is no penalty.
        target: mean KL per sequence, in nats, that the coefficient steers to; ``None`` keeps the coefficient.
        horizon: sequences over which the coefficient reacts.
    """

    init_kl_coef: float = 0.2
    target: float | None = 3.0
    horizon: float = 10_000.0

    def __post_init__(self) -> None:
        """Validate hyperparameters."""
        if not 0 <= self.init_kl_coef < math.inf:
            raise UserError(f"RewardKL needs a finite init_kl_coef >= 0, got {self.init_kl_coef}")
        if self.target is not None and not 0 < self.target < math.inf:
            raise UserError(f"RewardKL needs a finite target > 0 (or null), got {self.target}")
        if not 0 < self.horizon < math.inf:
            raise UserError(f"RewardKL needs a finite horizon > 0, got {self.horizon}")

    def init(self) -> State:
        """The coefficient."""
        return {"kl_coefficient": torch.tensor(self.init_kl_coef)}

    def observe(self, kl: float, sequences: int, state: State) -> State:
        """Proportional control in log space, its error clipped to +-0.2."""
        if self.target is None:
            return state
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        coefficient = state["kl_coefficient"] * math.exp(error * min(sequences / self.horizon, 1.0))
        # Float32 would round a long decay to 0, from which no factor leads back.
        smallest = torch.finfo(coefficient.dtype).tiny if self.init_kl_coef > 0 else 0.0
        return {"kl_coefficient": coefficient.clamp(min=smallest)}

    def reward_coefficient(self, state: State) -> float:
        """The adapted coefficient."""
        return float(state["kl_coefficient"])

    def loss(self, logprobs_BT: Tensor, reference_logprobs_BT: Tensor) -> Tensor:
        """Nothing."""
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
        """Validate hyperparameters."""
        if not 0 <= self.beta < math.inf:
            raise UserError(f"LossKL needs a finite beta >= 0, got {self.beta}")

    def reward_coefficient(self, state: State) -> float:
        """0: the reward is left as it is."""
        return 0.0

    def loss(self, logprobs_BT: Tensor, reference_logprobs_BT: Tensor) -> Tensor:
        """The charge."""
        return self.beta * squared_log_ratio(logprobs_BT, reference_logprobs_BT)
