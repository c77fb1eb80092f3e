"""Whole responses with their scores, as the combiners of scores read them.

Legend: B sequences, T tokens, N objectives, G prompts.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moa_lightning.functional.preference import fill_scores
from moa_lightning.signals import Signals


@dataclass(frozen=True)
class ScoredResponses:
    """Responses with their scores."""

    scores_BN: Tensor  # float64, in the objectives' units
    valid_BN: Tensor  # bool, scores that count
    group_B: Tensor  # which prompt a row belongs to
    kl_penalty_B: Tensor | None = None  # what the KL penalty takes off the combined score
    penalty_B: Tensor | None = None  # what each of the scores is less by

    def unpenalised(self) -> "ScoredResponses":
        """The same with the objectives' own scores."""
        if self.penalty_B is None:
            return self
        return replace(self, scores_BN=self.scores_BN + self.penalty_B.unsqueeze(1), penalty_B=None)

    def filled(self) -> tuple[Tensor, Tensor]:
        """Scores, a missing one replaced by the mean of the prompt's other responses, and which there are then."""
        return fill_scores(self.scores_BN, self.valid_BN, self.group_B)


def scored_responses(rows: Signals) -> ScoredResponses:
    """The responses that take part; without a group, each is the only one to its prompt."""
    assert rows.scores_BN is not None
    scores_BN, group_B = rows.scores_BN, rows.group_B
    counted_BN = rows.valid_BN & rows.mask_BT.any(1, keepdim=True)
    if group_B is None:
        group_B = torch.arange(len(scores_BN), device=scores_BN.device)
    kl_penalty_B, penalty_B = (
        None if taken is None else taken.double() for taken in (rows.kl_penalty_B, rows.penalty_B)
    )
    return ScoredResponses(scores_BN.double().where(counted_BN, 0.0), counted_BN, group_B, kl_penalty_B, penalty_B)
