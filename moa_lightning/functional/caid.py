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
    """The kept responses as a problem; float64."""

    scores_RN: Tensor  # less the penalty; a missing one is the mean of the prompt's others
    present_RN: Tensor  # bool: False in prompts that an objective did not score at all
    scored_RN: Tensor  # bool: the response itself has the score
    penalty_R: Tensor
    log_prior_R: Tensor
    group_R: Tensor

    @classmethod
    def of(cls, samples_RC: Tensor) -> "ReferenceSamples":
        """From a table with a row for each response.

        Args:
            samples_RC: each objective's score without penalties (NaN: none), then penalty, log-weight under the
                reference, and prompt.
        """
        raw_RN, penalty_R, group_R = samples_RC[:, :-3].double(), samples_RC[:, -3].double(), samples_RC[:, -1].long()
        filled_RN, present_RN = fill_scores(raw_RN.nan_to_num(), raw_RN.isfinite(), group_R)
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


@dataclass(frozen=True)
class ReferenceDual:
    """What the responses of the reference say of the multipliers."""

    duals_N: Tensor  # 0 where there is no threshold
    feasible: bool  # whether some policy on these responses meets all thresholds
    attainable_N: Tensor  # mean of each objective if the best response were always chosen


def reference_dual(
    samples: ReferenceSamples, primary_N: Tensor, thresholds_N: Tensor, beta: float, fixed: bool, pool_prompts: bool
) -> ReferenceDual | None:
    """Solve the dual on responses of the reference; None where no response has the scores that a threshold takes.

    A missing score does not say what a policy would have, so nothing is put in its place. Pooled, only responses count
    that have all the scores that the problem takes. By prompt, one where only some of the responses have an objective's
    score counts in no expectation of it; where none has, the objective's term is left out, as in training.

    Args:
        samples: responses of the reference.
        primary_N: 1 for the primary objective, else 0.
        thresholds_N: least means; NaN where there is none.
        beta: strength of the KL penalty.
        fixed: whether the thresholds are given; else they are the means of these very responses, penalties included.
        pool_prompts: take what responses add to their prompt's level as samples of one distribution for all prompts.

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
