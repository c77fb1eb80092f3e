"""Importance-weighted behaviour cloning.

Legend: B sequences, T tokens.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from typing_extensions import override

from moa_lightning.combiners.base import Combined
from moa_lightning.distributed import all_sum
from moa_lightning.errors import UserError
from moa_lightning.losses.base import LossTerms, PolicyLoss
from moa_lightning.losses.kl import KLPenalty
from moa_lightning.models.policy import PolicyOutput
from moa_lightning.signals import ClipRange
from moa_lightning.types import Experience


@dataclass(frozen=True)
class WeightedLikelihood(PolicyLoss):
    """``-E[w(y) log pi(y)]``: raise the likelihood of each response by its weight, which has no gradient.

    With the weights of ``MOPO`` its minimiser is the constrained optimum itself. Negative weights would make the loss
    unbounded below and are refused: use ``ClippedSurrogate`` for combiners whose score is an advantage.

    Logged: ``ess``, the effective sample size ``(sum w)^2 / sum w^2`` as a share of the responses, and
    ``capped_ratio``, the share whose weight was clipped to ``max_weight``.

    The sum over a response's tokens is divided by the number of responses, not of tokens: the expectation is over
    responses, and a divisor that depends on the lengths in each batch would favour short ones.

    Source: Agnihotri et al., arXiv 2505.10892, the policy step of Algorithm 1.

    Args:
        max_weight: largest weight; ``None`` does not clip. Clipping trades bias for variance.
    """

    max_weight: float | None = None

    takes_advantages: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.max_weight is not None and not self.max_weight > 0:
            raise UserError(f"WeightedLikelihood needs max_weight > 0 (or null), got {self.max_weight}")

    @property
    @override
    def clip_range(self) -> ClipRange:
        return ClipRange()

    def __call__(self, combined: Combined, experience: Experience, output: PolicyOutput, kl: KLPenalty) -> LossTerms:
        """Compute the loss of these rows and its terms."""
        mask_BT, score = experience.mask_BT, combined.score
        if bool((score < 0).any()):
            raise UserError(
                "loss WeightedLikelihood needs weights of at least 0, and this combiner's score is an advantage of "
                "either sign; use loss ClippedSurrogate with it"
            )
        rows = experience.counted_rows
        tokens = max(experience.tokens_per_row * rows, 1e-8)
        weights = score.detach()
        capped = weights if self.max_weight is None else weights.clamp(max=self.max_weight)
        weights_BT = capped if capped.ndim == 2 else capped.unsqueeze(1)
        policy_loss = -(weights_BT * output.logprobs_BT).where(mask_BT, 0.0).sum() / rows
        kl_loss = kl.loss(output.logprobs_BT, experience.reference_logprobs_BT).where(mask_BT, 0.0).sum() / rows
        entropy = output.entropy_BT.where(mask_BT, 0.0).sum() / tokens
        terms = {"policy_loss": policy_loss.detach(), "kl_loss": kl_loss.detach(), "entropy": entropy.detach()}
        with torch.no_grad():
            row_B = capped if capped.ndim == 1 else (capped * mask_BT).sum(1) / mask_BT.sum(1).clamp(min=1)
            total, squares = all_sum(torch.stack([row_B.sum(), row_B.square().sum()])).double()
            all_rows = all_sum(torch.tensor(float(len(row_B)), device=row_B.device, dtype=torch.float64))
            terms["ess"] = (total.square() / squares.clamp(min=1e-30) / all_rows).float()
            terms["capped_ratio"] = (weights > capped).float().reshape(len(weights), -1).mean(1).sum() / rows
        return LossTerms(policy_loss + kl_loss, terms)
