"""Advantage estimators: with critics, or relative to the prompt's other responses.

Legend: B sequences, T tokens, N objectives, G responses to one prompt.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from moa_lightning.distributed import all_sum
from moa_lightning.errors import UserError
from moa_lightning.functional.advantages import gae, group_relative, masked_sum


class AdvantageEstimator(ABC):
    """Estimates per-objective advantages from per-token rewards."""

    needs_values: bool

    def check(self, group_size: int) -> None:
        """Refuse a number of responses per prompt that the estimator cannot use."""

    @abstractmethod
    def estimate(
        self, rewards_BTN: Tensor, values_BTN: Tensor | None, mask_BT: Tensor, valid_BN: Tensor, group_size: int
    ) -> tuple[Tensor, Tensor | None]:
        """Estimate ``(advantages_BTN, returns_BTN)``; returns are the value heads' targets, None without critics."""


@dataclass(frozen=True)
class GAE(AdvantageEstimator):
    """Generalised advantage estimation with one value head per objective, as in PAMA.

    Source: Schulman et al. 2016, arXiv 1506.02438.

    Args:
        gamma: discount per token.
        lam: the lambda of GAE.
        standardize: scale each objective's advantages to mean 0 and standard deviation 1 over the batch of all
            processes, without the rows that lack that objective.
    """

    gamma: float = 1.0
    lam: float = 0.95
    standardize: bool = True

    needs_values = True

    def __post_init__(self) -> None:
        """Validate hyperparameters."""
        if not (0 <= self.gamma <= 1 and 0 <= self.lam <= 1):
            raise UserError(f"GAE needs gamma and lam in [0, 1], got {self.gamma} and {self.lam}")

    def estimate(
        self, rewards_BTN: Tensor, values_BTN: Tensor | None, mask_BT: Tensor, valid_BN: Tensor, group_size: int
    ) -> tuple[Tensor, Tensor | None]:
        """Estimate advantages by GAE per objective; returns are not standardised."""
        assert values_BTN is not None
        advantages_BTN, returns_BTN = gae(rewards_BTN, values_BTN, mask_BT, self.gamma, self.lam)
        present_BTN = mask_BT.unsqueeze(-1) & valid_BN.unsqueeze(1)
        if self.standardize:
            advantages_BTN = standardize(advantages_BTN, present_BTN)
        return advantages_BTN.where(present_BTN, 0.0), returns_BTN


@dataclass(frozen=True)
class GroupRelative(AdvantageEstimator):
    """Reward of the response minus the mean over its prompt's responses, the same for all its tokens; no critics.

    Source: Shao et al. 2024, arXiv 2402.03300 (GRPO, ``scale_rewards: true``); Liu et al. 2025, arXiv 2503.20783.

    Args:
        scale_rewards: divide by the standard deviation of the group.
        standardize: scale each objective's advantages to mean 0 and standard deviation 1 over the batch of all
            processes, without the rows that lack that objective.
    """

    scale_rewards: bool = False
    standardize: bool = True

    needs_values = False

    def check(self, group_size: int) -> None:
        """Refuse a single response per prompt."""
        if group_size < 2:
            raise UserError(
                "GroupRelative compares the responses of one prompt: set source.num_generations to 2 or more, or use "
                "advantages GAE"
            )

    def estimate(
        self, rewards_BTN: Tensor, values_BTN: Tensor | None, mask_BT: Tensor, valid_BN: Tensor, group_size: int
    ) -> tuple[Tensor, Tensor | None]:
        """Estimate group-relative advantages of the response's total reward, including its KL penalty."""
        total_BN = rewards_BTN.where(mask_BT.unsqueeze(-1), 0.0).sum(1)
        scored_BN = valid_BN & mask_BT.any(1, keepdim=True)
        advantages_BN = group_relative(total_BN, scored_BN, group_size, self.scale_rewards)
        if self.standardize:
            advantages_BN = standardize(advantages_BN, scored_BN).where(scored_BN, 0.0)
        return advantages_BN.unsqueeze(1) * mask_BT.unsqueeze(-1), None


def standardize(values: Tensor, mask: Tensor) -> Tensor:
    """Scale each objective (last dimension) to mean 0 and standard deviation 1, over the mask and all processes."""
    dims = tuple(range(values.ndim - 1))
    total_N, count_N = masked_sum(values, mask, dims)
    count_N = all_sum(count_N).clamp(min=1)
    mean_N = all_sum(total_N) / count_N
    centred = (values - mean_N).where(mask, 0.0)  # two passes: exact where the mean is far larger than the spread
    variance_N = all_sum(centred.square().sum(dims)) / count_N
    # The floor grows with the mean: for a constant objective, only rounding errors would be left to scale up.
    return centred / (variance_N.sqrt() + 1e-8 + 1e-5 * mean_N.abs())
