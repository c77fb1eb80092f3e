"""What CAID keeps of the reference: its responses with their scores.

Legend: B sequences, R kept responses of C columns, N objectives.
"""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from moa_lightning.combiners.shared.responses import ScoredResponses
from moa_lightning.distributed import all_rows, rank
from moa_lightning.functional.dual import without_prompt_effects
from moa_lightning.functional.preference import group_softmax, group_sum
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
    scored_RN: Tensor  # bool: the response itself has the score
    penalty_R: Tensor
    log_prior_R: Tensor
    group_R: Tensor

    @classmethod
    def of(cls, samples_RC: Tensor) -> "ReferenceSamples":
        """From what :func:`with_responses` gives."""
        raw_RN, penalty_R, group_R = samples_RC[:, :-3].double(), samples_RC[:, -3].double(), samples_RC[:, -1].long()
        filled_RN, present_RN = ScoredResponses(raw_RN.nan_to_num(), raw_RN.isfinite(), group_R).filled()
        scores_RN = filled_RN - penalty_R.unsqueeze(1)
        return cls(scores_RN, present_RN, raw_RN.isfinite(), penalty_R, samples_RC[:, -2].double(), group_R)

    def pooled(self, needed_N: Tensor) -> "ReferenceSamples":
        """The responses that all needed objectives scored, as if they were to one prompt; each prompt weighs as much.

        Args:
            needed_N: bool.
        """
        used_R = self.scored_RN[:, needed_N].all(1)
        rows = {field.name: getattr(self, field.name)[used_R] for field in fields(self)}
        if not used_R.any():
            return ReferenceSamples(**rows)
        group_R = rows["group_R"].unique(return_inverse=True)[1]
        scores_RN = without_prompt_effects(rows["scores_RN"], group_R, rows["log_prior_R"])
        log_prior_R = group_softmax(rows["log_prior_R"], group_R).log()
        one = {"scores_RN": scores_RN, "log_prior_R": log_prior_R, "group_R": torch.zeros_like(group_R)}
        return ReferenceSamples(**rows | one)

    @property
    def prior_R(self) -> Tensor:
        """Weight of a response among those to its prompt."""
        return group_softmax(self.log_prior_R, self.group_R)

    def without_penalties(self) -> "ReferenceSamples":
        """The same with the objectives' own scores."""
        unpenalised_RN = self.scores_RN + self.penalty_R.unsqueeze(1)
        return replace(self, scores_RN=unpenalised_RN, penalty_R=torch.zeros_like(self.penalty_R))

    def means(self, counted_RN: Tensor) -> Tensor:
        """Mean of each objective under the reference, over what counts; NaN where nothing does."""
        prior_RN = self.prior_R.unsqueeze(1) * counted_RN
        return (prior_RN * self.scores_RN).sum(0) / prior_RN.sum(0)

    def deviations(self) -> Tensor:
        """Standard deviation of each objective among the responses to a prompt; 0 where nothing is known of it."""
        prior_RN = self.prior_R.unsqueeze(1) * self.present_RN
        means_GN = group_sum(prior_RN * self.scores_RN, self.group_R)
        squares_RN = prior_RN * (self.scores_RN - means_GN[self.group_R]).square()
        return (squares_RN.sum(0) / prior_RN.sum(0).clamp(min=1e-9)).sqrt()

    def complete(self) -> Tensor:
        """Bool ``(R, N)``: True in prompts whose responses all have the objective's score."""
        return group_sum((~self.scored_RN).double(), self.group_R)[self.group_R] == 0
