"""What CAID keeps of the reference: its responses with their scores.

Legend: B sequences, R kept responses of C columns, N objectives.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from moa_lightning.combiners.responses import ScoredResponses
from moa_lightning.distributed import all_rows, rank
from moa_lightning.functional.preference import group_count, group_softmax, group_sum
from moa_lightning.types import Experience


def with_responses(samples_RC: Tensor, experience: Experience) -> Tensor:
    """The kept responses and those of a collected batch, over all processes.

    Columns: each objective's score without penalties (NaN: none), penalty, log-weight under the reference, prompt.
    """
    scores_BN = experience.rewards.trained_BN.where(experience.valid_BN, torch.nan)
    zeros_B = torch.zeros_like(scores_BN[:, 0])
    penalty_B = zeros_B if experience.penalty_B is None else experience.penalty_B
    log_prior_B = zeros_B if experience.log_prior_B is None else experience.log_prior_B
    assert experience.group_B is not None
    place_B = (zeros_B + rank(), experience.group_B.to(zeros_B))  # prompts are counted on each process by itself
    columns_BC = torch.cat([scores_BN, torch.stack([penalty_B.to(zeros_B), log_prior_B, *place_B], 1)], 1)
    new_RC = all_rows(columns_BC[experience.mask_BT.any(1) & experience.valid_BN.any(1)]).cpu()
    if len(new_RC) == 0:
        return samples_RC
    prompts_R = new_RC[:, -2:].unique(dim=0, return_inverse=True)[1]
    if len(samples_RC):
        prompts_R = prompts_R + samples_RC[:, -1].max() + 1
    return torch.cat([samples_RC, torch.cat([new_RC[:, :-2], prompts_R.to(new_RC).unsqueeze(1)], 1)])


@dataclass(frozen=True)
class ReferenceSamples:
    """The kept responses as a problem; float64."""

    scores_RN: Tensor  # less the penalty; a missing one is the mean of the prompt's others
    present_RN: Tensor  # bool: False in prompts that an objective did not score at all
    complete_RN: Tensor  # bool: True in prompts whose responses all have the objective's score
    penalty_R: Tensor
    log_prior_R: Tensor
    group_R: Tensor

    @classmethod
    def of(cls, samples_RC: Tensor) -> "ReferenceSamples":
        """From what :func:`with_responses` gives."""
        raw_RN, penalty_R, group_R = samples_RC[:, :-3].double(), samples_RC[:, -3].double(), samples_RC[:, -1].long()
        filled_RN, present_RN = ScoredResponses(raw_RN.nan_to_num(), raw_RN.isfinite(), group_R).filled()
        complete_RN = group_sum(raw_RN.isnan().double(), group_R)[group_R] == 0
        scores_RN = filled_RN - penalty_R.unsqueeze(1)
        return cls(scores_RN, present_RN, complete_RN, penalty_R, samples_RC[:, -2].double(), group_R)

    def select(self, rows_R: Tensor) -> "ReferenceSamples":
        """The rows where a mask is True, their prompts counted from 0."""
        rows = {field.name: getattr(self, field.name)[rows_R] for field in fields(self)}
        return ReferenceSamples(**rows | {"group_R": rows["group_R"].unique(return_inverse=True)[1]})

    @property
    def prior_R(self) -> Tensor:
        """Weight of a response among those to its prompt."""
        return group_softmax(self.log_prior_R, self.group_R)

    def means(self) -> Tensor:
        """Mean of each objective under the reference, without penalties, over the prompts that have it; or NaN."""
        prior_RN = self.prior_R.unsqueeze(1) * self.present_RN
        return (prior_RN * (self.scores_RN + self.penalty_R.unsqueeze(1))).sum(0) / prior_RN.sum(0)

    def deviations(self) -> Tensor:
        """Standard deviation of each objective among the responses to a prompt; 0 where nothing is known of it."""
        prior_RN = self.prior_R.unsqueeze(1) * self.present_RN
        means_GN = group_sum(prior_RN * self.scores_RN, self.group_R)
        squares_RN = prior_RN * (self.scores_RN - means_GN[self.group_R]).square()
        return (squares_RN.sum(0) / prior_RN.sum(0).clamp(min=1e-9)).sqrt()

    def complete_share(self) -> Tensor:
        """Share of the prompts that are complete for each objective."""
        return (self.prior_R.unsqueeze(1) * self.complete_RN).sum(0) / group_count(self.group_R)
