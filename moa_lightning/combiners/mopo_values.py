"""MOPO's expectations over the responses to each prompt.

Legend: B sequences, N objectives, G groups that share one normalisation.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from moa_lightning.distributed import all_rows, all_sum
from moa_lightning.functional.mopo import mopo_policy, robust_value
from moa_lightning.functional.preference import fill_from_group, group_max, group_softmax, group_sum
from moa_lightning.signals import Signals
from moa_lightning.types import Experience


@dataclass(frozen=True)
class Judged:
    """Responses with their win probabilities, and which of them take part."""

    wins_BN: Tensor  # NaN: unknown
    group_B: Tensor  # which prompt a row belongs to
    pool_B: Tensor  # the rows that share one normalisation: a prompt's, or all
    trained_B: Tensor
    log_prior_B: Tensor | None

    @property
    def counted_B(self) -> Tensor:
        """Responses that are trained on and that somebody judged; the others have no share in any expectation."""
        return self.trained_B & self.wins_BN.isfinite().any(1)

    @property
    def complete_BN(self) -> Tensor:
        """Judgements of prompts all of whose responses have one; the others are in no expectation of the objective.

        A prompt that lacks some would be counted as if the policy were trained on all of them, which it is not.
        """
        judged_BN = self.wins_BN.isfinite()
        lacking_BN = ~judged_BN & (self.trained_B | ~judged_BN.any(1)).unsqueeze(1)
        lacking_GN = group_sum(lacking_BN.float(), self.group_B) > 0
        return judged_BN & self.counted_B.unsqueeze(1) & ~lacking_GN[self.group_B]

    def policy(self, weights_N: Tensor, tau: float) -> Tensor:
        """Probability of each response among those of its pool under the constrained optimum."""
        filled_BN = fill_from_group(self.wins_BN, self.group_B)
        return mopo_policy(filled_BN, weights_N.to(filled_BN.device), tau, self._log_weights(), self.pool_B)

    def prior(self) -> Tensor:
        """Probability of each response among those of its pool under the reference."""
        return group_softmax(self._log_weights(), self.pool_B)

    def choice(self, log_weights_B: Tensor) -> Tensor:
        """Probability of each response among those to its prompt, from its log-weight."""
        return group_softmax(log_weights_B.masked_fill(~self.counted_B, -torch.inf), self.group_B)

    def labelled(self) -> Tensor:
        """Share of the prompts that count in each objective's values, over all processes."""
        counts_GN = group_max(torch.cat([self.complete_BN, self.trained_B.unsqueeze(1)], 1).float(), self.group_B)
        counts_N = all_sum((counts_GN > 0).float().sum(0)).cpu()
        return counts_N[:-1] / counts_N[-1]

    def votes(self) -> tuple[Tensor, float]:
        """Bool ``(N,)``: whether all labels are means of single votes (a win, a loss or a draw against each rival).

        Also the mean number of responses to a prompt. Both are over all processes.
        """
        judged_BN = self.wins_BN.isfinite()
        rivals_B1 = (torch.bincount(self.group_B)[self.group_B] - 1).unsqueeze(1)
        halves_BN = (self.wins_BN * 2 * rivals_B1).where(judged_BN, 0.0)
        graded_BN = (halves_BN - halves_BN.round()).abs() > 1e-3
        decided_BN = judged_BN & ((self.wins_BN - 0.5).abs() > 1e-3)
        sizes = torch.tensor([float(len(self.group_B)), float(len(self.group_B.unique()))]).to(self.wins_BN)
        counts = all_sum(torch.cat([graded_BN.sum(0).to(sizes), decided_BN.sum(0).to(sizes), sizes])).cpu()
        graded_N, decided_N, sizes = counts.split([self.wins_BN.shape[1], self.wins_BN.shape[1], 2])
        return (graded_N == 0) & (decided_N > 0), float(sizes[0] / sizes[1].clamp(min=1))

    def values(self, policy_B: Tensor, radius: float) -> tuple[Tensor, Tensor]:
        """Mean of each objective under a policy, over the prompts that have it and over all processes; its ``chi``."""
        present_BN, policy_B1 = self.complete_BN, policy_B.unsqueeze(1)
        weighted_BN = (policy_B1 * self.wins_BN).where(present_BN, 0.0)
        mass_BN = policy_B1.expand_as(self.wins_BN).where(present_BN, 0.0)
        totals_2N = all_sum(torch.stack([weighted_BN.sum(0), mass_BN.sum(0)])).cpu()
        values_N, chi_N = totals_2N[0] / totals_2N[1], torch.full_like(totals_2N[0], torch.inf)
        if radius == 0:
            return values_N, chi_N
        prior_B = self.prior()
        for i in range(self.wins_BN.shape[1]):
            rows_B = present_BN[:, i] & (prior_B > 0)
            # rho q per response, its prompts equally likely: the ball is around the reference over the whole batch.
            rho_q = all_rows((policy_B / prior_B * self.wins_BN[:, i])[rows_B])
            log_prior = all_rows(prior_B[rows_B]).log()  # on every process, whether or not it has rows
            if len(rho_q):
                values_N[i], chi_N[i] = robust_value(rho_q, radius, log_prior)
        return values_N, chi_N

    def attainable(self) -> Tensor:
        """Mean of each objective if the best response to each prompt, by these very labels, were always chosen.

        No policy has more. On votes none comes near: a vote that is an accident counts here as a preference.
        """
        best_GN = group_max(self.wins_BN.where(self.complete_BN, -torch.inf), self.pool_B)
        found_GN = best_GN.isfinite()
        sums_2N = all_sum(torch.stack([best_GN.where(found_GN, 0.0).sum(0), found_GN.float().sum(0)])).cpu()
        return sums_2N[0] / sums_2N[1]

    def _log_weights(self) -> Tensor:
        """Under the reference; -inf is what takes no part."""
        log_prior_B = torch.zeros_like(self.wins_BN[:, 0]) if self.log_prior_B is None else self.log_prior_B
        return log_prior_B.masked_fill(~self.counted_B, -torch.inf)


def judged_responses(rows: Experience | Signals, normalize: Literal["prompt", "batch"]) -> Judged:
    """The responses of a collected batch, or of a minibatch of it."""
    assert rows.wins_BN is not None and rows.group_B is not None
    pool_B = rows.group_B if normalize == "prompt" else torch.zeros_like(rows.group_B)
    return Judged(rows.wins_BN.float(), rows.group_B, pool_B, rows.mask_BT.any(1), rows.log_prior_B)


def own_responses(experience: Experience) -> Judged:
    """The responses that say how good the policy itself is.

    On rollouts these are all that have a win probability, as in evaluations: also cut-off ones that the update leaves
    out. Without those the policy would look better than it is, as long as they are worse.
    """
    judged = judged_responses(experience, "prompt")
    if experience.moving_BN is None:
        return judged
    return replace(judged, trained_B=torch.ones_like(judged.trained_B))


def has_own_values(experience: Experience) -> Tensor:
    """Bool ``(N,)``: whether the mean win probability of the policy itself says how good it is.

    Against its own other responses it would be .5 whatever they are worth. The same on all processes.
    """
    if experience.log_policy_B is None:
        return torch.zeros(len(experience.rewards.trained_names), dtype=torch.bool)
    if experience.moving_BN is None:
        return torch.ones(len(experience.rewards.trained_names), dtype=torch.bool)
    return ~experience.moving_BN.cpu().any(0)
