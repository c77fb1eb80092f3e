"""PPO's loss on one combined score, with N value heads.

Legend: B sequences, T tokens, N objectives.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moa_lightning.combiners.base import Combined
from moa_lightning.functional.surrogate import clipped_surrogate, probability_ratio, value_loss
from moa_lightning.losses.base import LossTerms, PolicyLoss
from moa_lightning.losses.kl import KLPenalty
from moa_lightning.models.policy import PolicyOutput
from moa_lightning.types import Experience


@dataclass(frozen=True)
class ClippedSurrogate(PolicyLoss):
    """Clipped surrogate, value loss of each head, entropy bonus and, if so configured, KL.

    Every sum is divided by the number of trained tokens that this many rows have on average in the collected batch,
    over all processes. So accumulated and distributed minibatches add up to one batch, whatever their lengths.

    Source: Schulman et al. 2017, arXiv 1707.06347.

    Args:
        cliprange: epsilon of the clipped surrogate.
        vf_coef: weight of the value loss (the sum over the N heads).
        cliprange_value: how far a value may move from its old estimate per update; ``None`` does not clip.
        entropy_coef: weight of the entropy bonus.
    """

    cliprange: float = 0.2
    vf_coef: float = 0.1
    cliprange_value: float | None = None
    entropy_coef: float = 0.0

    def __post_init__(self) -> None:
        """Refuse values without meaning."""
        if self.cliprange <= 0 or self.vf_coef < 0 or (self.cliprange_value is not None and self.cliprange_value <= 0):
            raise ValueError("ClippedSurrogate needs cliprange > 0, vf_coef >= 0 and cliprange_value > 0 (or null)")

    @property
    def clip_range(self) -> float:
        """Epsilon."""
        return self.cliprange

    def __call__(self, combined: Combined, experience: Experience, output: PolicyOutput, kl: KLPenalty) -> LossTerms:
        """Loss of these rows and its terms."""
        mask_BT, score = experience.mask_BT, combined.score
        tokens = max(experience.tokens_per_row * experience.counted_rows, 1e-8)
        ratio_BT = probability_ratio(output.logprobs_BT, experience.behaviour_logprobs_BT)
        score_BT = score if score.ndim == 2 else score.unsqueeze(1).expand_as(ratio_BT)

        def mean(values_BT: Tensor) -> Tensor:
            return values_BT.where(mask_BT, 0.0).sum() / tokens

        policy_loss = mean(clipped_surrogate(ratio_BT, score_BT, self.cliprange))
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
            terms["clip_ratio"] = mean(((ratio_BT - 1).abs() > self.cliprange).float())
            terms["approx_kl"] = mean((ratio_BT - 1) - ratio_BT.log())
        return LossTerms(loss, {name: value.detach() for name, value in terms.items()})
