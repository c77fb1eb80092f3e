"""CAID's mathematics: responses of the reference as a constrained problem, and the multipliers that solve it.

Legend: R responses of the reference, C columns, N objectives, M of them with a threshold, G prompts.
"""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from moa_lightning.functional.dual import one_shot_dual, without_prompt_effects
from moa_lightning.functional.preference import fill_scores, group_max, group_softmax, group_sum


@dataclass(frozen=True)
class ReferenceSamples:
    """Responses of the reference with their scores, as data of the dual problem; float64."""

    scores_RN: Tensor  # minus the penalty; a missing score is the mean of the prompt's other responses
    present_RN: Tensor  # bool: False in prompts without any score of the objective
    scored_RN: Tensor  # bool: whether the response itself has the score
    penalty_R: Tensor
    log_prior_R: Tensor
    group_R: Tensor

    @classmethod
    def of(cls, samples_RC: Tensor) -> "ReferenceSamples":
        """Build from a table with a row for each response.

        Args:
            samples_RC: each objective's score without penalties (NaN: none), then penalty, log-weight under the
                reference, and prompt.
        """
        raw_RN, penalty_R, group_R = samples_RC[:, :-3].double(), samples_RC[:, -3].double(), samples_RC[:, -1].long()
        filled_RN, present_RN = fill_scores(raw_RN.nan_to_num(), raw_RN.isfinite(), group_R)
        scores_RN = filled_RN - penalty_R.unsqueeze(1)
        return cls(scores_RN, present_RN, raw_RN.isfinite(), penalty_R, samples_RC[:, -2].double(), group_R)

    def pooled(self, needed_N: Tensor) -> "ReferenceSamples":
        """Responses with scores of all needed objectives, as if to one prompt. All prompts have the same weight.

        Args:
            needed_N: bool, the objectives.
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
        """The same responses, with scores without penalties."""
        unpenalised_RN = self.scores_RN + self.penalty_R.unsqueeze(1)
        return replace(self, scores_RN=unpenalised_RN, penalty_R=torch.zeros_like(self.penalty_R))

    def means(self, counted_RN: Tensor) -> Tensor:
        """Mean of each objective under the reference, over the counted responses; NaN if there are none."""
        prior_RN = self.prior_R.unsqueeze(1) * counted_RN
        return (prior_RN * self.scores_RN).sum(0) / prior_RN.sum(0)

    def deviations(self) -> Tensor:
        """Standard deviation of each objective among the responses to a prompt; 0 if it has no scores."""
        prior_RN = self.prior_R.unsqueeze(1) * self.present_RN
        means_GN = group_sum(prior_RN * self.scores_RN, self.group_R)
        squares_RN = prior_RN * (self.scores_RN - means_GN[self.group_R]).square()
        return (squares_RN.sum(0) / prior_RN.sum(0).clamp(min=1e-9)).sqrt()

    def complete(self) -> Tensor:
        """Bool ``(R, N)``: whether all responses to the row's prompt have the objective's score."""
        return group_sum((~self.scored_RN).double(), self.group_R)[self.group_R] == 0


@dataclass(frozen=True)
class ReferenceDual:
    """Multipliers estimated from responses of the reference."""

    duals_N: Tensor  # 0 for objectives without a threshold
    feasible: bool  # whether some policy on these responses meets all thresholds
    attainable_N: Tensor  # mean of each objective if always the best response were chosen


def reference_dual(
    samples: ReferenceSamples, primary_N: Tensor, thresholds_N: Tensor, beta: float, fixed: bool, pool_prompts: bool
) -> ReferenceDual | None:
    """Solve the dual on responses of the reference. Returns None if no response has the scores that a threshold needs.

    Missing scores are not imputed. With pooling, only responses with all needed scores count. Without pooling, a prompt
    with scores for only some of its responses is left out of that objective's expectations; if it has no score at all,
    the objective's term is left out, as in training.

    Args:
        samples: responses of the reference.
        primary_N: 1 for the primary objective, else 0.
        thresholds_N: lower bounds of the means; NaN for objectives without one.
        beta: strength of the KL penalty.
        fixed: whether to use these thresholds; otherwise they are the means of these responses, including penalties.
        pool_prompts: treat the effects of responses, beyond their prompt's level, as samples of one distribution for
            all prompts.

    Source: Huang et al., arXiv 2405.19544, Eq. 8, by :func:`one_shot_dual`; the pooling by
    :func:`without_prompt_effects`.
    """
    bound_N, counted_RN = thresholds_N.isfinite(), samples.complete()
    if pool_prompts:
        samples = samples.pooled(bound_N | (primary_N > 0))
        counted_RN = samples.scored_RN
    if not counted_RN[:, bound_N].any(0).all():
        return None
    if not fixed:
        thresholds_N = samples.means(counted_RN).where(bound_N, torch.nan) - 1e-9  # the reference itself meets them
    primary_R = (samples.scores_RN * primary_N).where(samples.present_RN, 0.0).sum(1)
    excess_RM = (samples.scores_RN - thresholds_N).where(counted_RN, 0.0)[:, bound_N]
    nothing_M = excess_RM.new_zeros(excess_RM.shape[1])
    found = one_shot_dual(primary_R, excess_RM, nothing_M, beta, samples.group_R, samples.log_prior_R)
    duals_N = torch.zeros_like(primary_N)
    duals_N[bound_N] = found.duals.float()
    best_GN = group_max(samples.scores_RN.where(counted_RN, -torch.inf), samples.group_R)
    known_GN = best_GN.isfinite()
    return ReferenceDual(duals_N, found.feasible, best_GN.where(known_GN, 0.0).sum(0) / known_GN.sum(0))
