"""PPO's loss on one combined score, with N value heads.

Legend: B sequences, T tokens, N objectives.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moa_lightning.combiners.base import Combined
from moa_lightning.errors import UserError
from moa_lightning.functional.surrogate import clipped_surrogate, probability_ratio, value_loss
from moa_lightning.losses.base import LossTerms, PolicyLoss
from moa_lightning.losses.kl import KLPenalty
from moa_lightning.models.policy import PolicyOutput
from moa_lightning.signals import ClipRange
from moa_lightning.types import Experience


@dataclass(frozen=True)
class ClippedSurrogate(PolicyLoss):
    """Clipped surrogate, value loss of each head, entropy bonus and, if so configured, KL.

    Every sum is divided by the average number of trained tokens of as many rows of the collected batch, over all
    processes. So accumulated and distributed minibatches add up to one batch, whatever their lengths.

    With ``importance_sampling_level: sequence`` the surrogate is a mean over responses, each the mean over its tokens,
    because the expectation is over responses. Value loss, entropy and KL stay means over tokens.

    Logged besides the terms: ``clip_ratio``, the share of tokens (or responses, at that level) whose ratio is outside
    ``[1 - cliprange, 1 + epsilon_high]``.

    Source: Schulman et al. 2017, arXiv 1707.06347. ``epsilon_high``: Yu et al. 2025 (DAPO), arXiv 2503.14476.
    ``delta``: Ye et al. 2020, arXiv 1912.09729. ``importance_sampling_level``: Zheng et al. 2025 (GSPO), arXiv
    2507.18071, Eq. 5; advantages that differ between a response's tokens share its ratio.

    Args:
        cliprange: epsilon of the clipped surrogate, TRL's ``epsilon``.
        vf_coef: weight of the value loss (the sum over the N heads).
        cliprange_value: how far a value may move from its old estimate per update; ``None`` does not clip.
        entropy_coef: weight of the entropy bonus.
        epsilon_high: epsilon above 1, as in TRL ("clip-higher", 0.28 in DAPO); ``None`` is ``cliprange``.
        delta: upper bound of the ratio for negative advantages, as in TRL (dual clip; verl's ``clip_ratio_c``, 3
            there); above ``1 + epsilon_high``. ``None`` is no bound.
        importance_sampling_level: as in TRL: ``token``, each token's ratio; ``sequence``, one ratio per response, the
            geometric mean over its tokens (GSPO, whose epsilons are some hundred times smaller: 3e-4 and 4e-4).
    """

    cliprange: float = 0.2
    vf_coef: float = 0.1
    cliprange_value: float | None = None
    entropy_coef: float = 0.0
    epsilon_high: float | None = None
    delta: float | None = None
    importance_sampling_level: Literal["token", "sequence"] = "token"

    def __post_init__(self) -> None:
        above_zero = {"cliprange": self.cliprange}
        above_zero |= {} if self.cliprange_value is None else {"cliprange_value": self.cliprange_value}
        above_zero |= {} if self.epsilon_high is None else {"epsilon_high": self.epsilon_high}
        for name, value in above_zero.items():
            if not (value > 0 and math.isfinite(value)):
                raise UserError(f"ClippedSurrogate.{name} must be a finite number above 0, got {value}")
        if not (self.vf_coef >= 0 and math.isfinite(self.vf_coef)):
            raise UserError(f"ClippedSurrogate.vf_coef must be a finite number of at least 0, got {self.vf_coef}")
        if not math.isfinite(self.entropy_coef):
            raise UserError(f"ClippedSurrogate.entropy_coef must be a finite number, got {self.entropy_coef}")
        if self.delta is not None and not self.delta > 1 + self.clip_range.high:
            raise UserError(
                f"ClippedSurrogate.delta must be above 1 + epsilon_high ({1 + self.clip_range.high}) or null, got "
                f"{self.delta}"
            )
        if self.importance_sampling_level not in ("token", "sequence"):
            raise UserError(
                "ClippedSurrogate.importance_sampling_level must be token or sequence, got "
                f"'{self.importance_sampling_level}'"
            )

    @property
    def clip_range(self) -> ClipRange:
        """The epsilons, and whether they bound the ratios of tokens or of responses."""
        high = self.cliprange if self.epsilon_high is None else self.epsilon_high
        return ClipRange(self.cliprange, high, self.delta, self.importance_sampling_level == "sequence")

    def __call__(self, combined: Combined, experience: Experience, output: PolicyOutput, kl: KLPenalty) -> LossTerms:
        """Compute the loss of these rows and its terms."""
        mask_BT, score, clip = experience.mask_BT, combined.score, self.clip_range
        tokens = max(experience.tokens_per_row * experience.counted_rows, 1e-8)
        ratio_BT = clip.ratio(output.logprobs_BT, experience.behaviour_logprobs_BT, mask_BT)
        score_BT = score if score.ndim == 2 else score.unsqueeze(1).expand_as(ratio_BT)

        def mean(values_BT: Tensor) -> Tensor:
            return values_BT.where(mask_BT, 0.0).sum() / tokens

        def mean_of_responses(values_BT: Tensor) -> Tensor:
            of_response_B = values_BT.where(mask_BT, 0.0).sum(1) / mask_BT.sum(1).clamp(min=1)
            return of_response_B.sum() / experience.counted_rows

        average = mean_of_responses if clip.of_responses else mean
        policy_loss = average(clipped_surrogate(ratio_BT, score_BT, clip.low, clip.high, clip.delta))
        entropy = mean(output.entropy_BT)
        kl_loss = mean(kl.loss(output.logprobs_BT, experience.reference_logprobs_BT))
        loss = policy_loss + kl_loss
        terms = {"policy_loss": policy_loss, "kl_loss": kl_loss, "entropy": entropy}
        if self.entropy_coef:
            loss = loss - self.entropy_coef * entropy
        if output.values_BTN is not None and experience.returns_BTN is not None:
            assert experience.values_BTN is not None
            error_BTN = value_loss(
                output.values_BTN, experience.values_BTN, experience.returns_BTN, self.cliprange_value
            )
            present_BTN = mask_BT.unsqueeze(-1) & experience.valid_BN.unsqueeze(1)
            losses_N = error_BTN.where(present_BTN, 0.0).sum((0, 1)) / tokens
            loss = loss + self.vf_coef * losses_N.sum()
            names = experience.rewards.trained_names
            terms |= {f"value_loss/{name}": value for name, value in zip(names, losses_N, strict=True)}
        with torch.no_grad():
            terms["clip_ratio"] = average(((ratio_BT - 1 > clip.high) | (1 - ratio_BT > clip.low)).float())
            of_token_BT = probability_ratio(output.logprobs_BT, experience.behaviour_logprobs_BT)
            terms["approx_kl"] = mean((of_token_BT - 1) - of_token_BT.log())
        return LossTerms(loss, {name: value.detach() for name, value in terms.items()})
