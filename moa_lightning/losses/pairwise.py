"""Losses on pairs of responses to the same prompt.

Legend: B sequences, T tokens, P pairs.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import override

from moa_lightning.combiners.base import Combined
from moa_lightning.distributed import all_sum, world_size
from moa_lightning.errors import UserError
from moa_lightning.functional.pairwise import dpo_loss, ipo_loss, modpo_logits, response_log_ratio
from moa_lightning.losses.base import LossTerms, PolicyLoss
from moa_lightning.losses.kl import KLPenalty
from moa_lightning.models.policy import PolicyOutput
from moa_lightning.signals import ClipRange, Signal
from moa_lightning.types import Experience

_LOSSES = {"sigmoid": dpo_loss, "ipo": ipo_loss}


@dataclass(frozen=True)
class PairwiseLogistic(PolicyLoss):
    """DPO and related losses: of two responses to a prompt, make the one with the higher score more likely.

    All pairs of responses to a prompt with different scores are compared. The pairs of a prompt share its weight
    equally, and a prompt without pairs contributes nothing. The log-ratios are relative to the module's ``reference``.
    With combiner ``MODPO`` the other objectives enter as a margin; with reference ``MultiReference`` this is MRPO.

    Logged: ``pair_accuracy``, the share of pairs that the policy's log-ratio orders like the score; ``pair_margin``,
    the mean of ``beta (D_chosen - D_rejected)``; and ``pairs``, the number of pairs per prompt.

    Source: Rafailov et al. 2023, arXiv 2305.18290, eq. 7 (``sigmoid``); Azar et al. 2023, arXiv 2310.12036, eq. 17
    (``ipo``). The log-ratios are sums over tokens in both, as in the papers. TRL's ``ipo`` uses their mean over tokens,
    which is ``average_log_prob`` here. A ``beta`` that was tuned for one does not suit the other.

    Args:
        beta: strength of the KL regularisation towards the reference. With ``average_log_prob`` its unit is a mean
            log-ratio per token, so it must be tuned again.
        loss_type: ``sigmoid`` (DPO) or ``ipo``.
        label_smoothing: probability that a comparison is the wrong way round.
        average_log_prob: a response's log-ratio is the mean over its tokens, not their sum: ``ipo`` is then TRL's
            ``ipo``, and ``sigmoid`` its ``sigmoid_norm``.
    """

    beta: float = 0.1
    loss_type: Literal["sigmoid", "ipo"] = "sigmoid"
    label_smoothing: float = 0.0
    average_log_prob: bool = False

    provides: ClassVar[frozenset[Signal]] = frozenset({Signal.PAIRS})
    needs: ClassVar[frozenset[Signal]] = frozenset({Signal.WINS})  # that is, several responses to a prompt

    def __post_init__(self) -> None:
        if not (self.beta > 0 and math.isfinite(self.beta)):
            raise UserError(f"PairwiseLogistic.beta must be a finite number above 0, got {self.beta}")
        if not 0 <= self.label_smoothing < 0.5:
            raise UserError(f"PairwiseLogistic.label_smoothing must lie in [0, 0.5), got {self.label_smoothing}")
        if self.loss_type not in _LOSSES:
            raise UserError(f"PairwiseLogistic.loss_type must be {' or '.join(_LOSSES)}, got '{self.loss_type}'")

    @property
    @override
    def clip_range(self) -> ClipRange:
        return ClipRange()

    def __call__(self, combined: Combined, experience: Experience, output: PolicyOutput, kl: KLPenalty) -> LossTerms:
        """Compute the loss of these rows and its terms."""
        assert experience.group_B is not None, "sources with one response per prompt are refused at the start"
        mask_BT = experience.mask_BT
        score_B = _of_rows(combined.score, mask_BT)
        trained_B = mask_BT.any(1)
        groups, group_B = experience.group_B.unique(return_inverse=True)
        same_prompt_BB = (group_B.unsqueeze(1) == group_B) & trained_B & trained_B.unsqueeze(1)
        chosen_P, rejected_P = (same_prompt_BB & (score_B.unsqueeze(1) > score_B)).nonzero(as_tuple=True)

        log_ratio_BT = output.logprobs_BT - experience.reference_logprobs_BT
        log_ratio_B = response_log_ratio(log_ratio_BT, mask_BT, self.average_log_prob)
        difference_P = log_ratio_B[chosen_P] - log_ratio_B[rejected_P]
        margin_B = torch.zeros_like(log_ratio_B) if combined.margin_B is None else combined.margin_B
        logits_P = modpo_logits(difference_P, margin_B[chosen_P] - margin_B[rejected_P], self.beta, combined.weight)
        losses_P = _LOSSES[self.loss_type](logits_P, self.beta, self.label_smoothing)

        # Each prompt has weight 1, however many pairs it has. Processes may have different numbers of prompts.
        pairs_G = torch.bincount(group_B[chosen_P], minlength=len(groups))
        prompts = float(all_sum(torch.tensor(float(len(groups)), device=group_B.device))) / world_size()
        share_P = 1 / (pairs_G[group_B[chosen_P]] * max(prompts, 1e-8)).to(losses_P.dtype)
        policy_loss = (losses_P * share_P).sum()
        tokens = max(experience.tokens_per_row * experience.counted_rows, 1e-8)

        def mean(values_BT: Tensor) -> Tensor:
            return values_BT.where(mask_BT, 0.0).sum() / tokens

        kl_loss = mean(kl.loss(output.logprobs_BT, experience.reference_logprobs_BT))
        with torch.no_grad():
            total = (all_sum(share_P.sum()) / world_size()).clamp(min=torch.finfo(share_P.dtype).tiny)
            terms = {
                "policy_loss": policy_loss,
                "kl_loss": kl_loss,
                "entropy": mean(output.entropy_BT),
                "pair_accuracy": ((difference_P > 0) * share_P).sum() / total,
                "pair_margin": (self.beta * difference_P * share_P).sum() / total,
                "pairs": (pairs_G.sum() / max(prompts, 1e-8)).float(),
            }
        # Even without pairs the loss depends on the policy, so that the backward pass works on every process.
        loss = policy_loss + kl_loss + 0.0 * log_ratio_B.sum()
        return LossTerms(loss, {name: value.detach() for name, value in terms.items()})


def _of_rows(score: Tensor, mask_BT: Tensor) -> Tensor:
    """One score for each response: as it is, or the mean over its tokens."""
    if score.ndim == 1:
        return score
    return score.where(mask_BT, 0.0).sum(1) / mask_BT.sum(1).clamp(min=1)
