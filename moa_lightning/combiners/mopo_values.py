"""MOPO's expectations over the responses to each prompt.

Legend: B sequences, N objectives, G groups that share one normalisation.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moa_lightning.distributed import all_rows, all_sum
from moa_lightning.functional.mopo import robust_value
from moa_lightning.functional.preference import fill_from_group, group_max, group_softmax
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
    def present_BN(self) -> Tensor:
        """Judgements that take part."""
        return self.wins_BN.isfinite() & self.counted_B.unsqueeze(1)

    def policy(self, weights_N: Tensor, tau: float) -> Tensor:
        """Probability of each response among those of its pool under the constrained optimum."""
        filled_BN = fill_from_group(self.wins_BN, self.group_B)
        return self._softmax((filled_BN * weights_N.to(filled_BN.device)).sum(1) / tau)

    def prior(self) -> Tensor:
        """Probability of each response among those of its pool under the reference."""
        return self._softmax(torch.zeros_like(self.wins_BN[:, 0]))

    def values(self, policy_B: Tensor, radius: float) -> tuple[Tensor, Tensor]:
        """Mean of each objective under a policy, over the prompts that have it and over all processes; its ``chi``."""
        present_BN, policy_B1 = self.present_BN, policy_B.unsqueeze(1)
        weighted_BN = (policy_B1 * self.wins_BN).where(present_BN, 0.0)
        # Where a prompt lacks some of an objective's labels, the others stand for them.
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
        """Mean of each objective if the best response to each prompt were always chosen: no policy has more."""
        best_GN = group_max(self.wins_BN.where(self.present_BN, -torch.inf), self.pool_B)
        found_GN = best_GN.isfinite()
        sums_2N = all_sum(torch.stack([best_GN.where(found_GN, 0.0).sum(0), found_GN.float().sum(0)])).cpu()
        return sums_2N[0] / sums_2N[1]

    def _softmax(self, logits_B: Tensor) -> Tensor:
        if self.log_prior_B is not None:
            logits_B = logits_B + self.log_prior_B
        return group_softmax(logits_B.masked_fill(~self.counted_B, -torch.inf), self.pool_B)


def judged_responses(rows: Experience | Signals, normalize: Literal["prompt", "batch"]) -> Judged:
    """The responses of a collected batch, or of a minibatch of it."""
    assert rows.wins_BN is not None and rows.group_B is not None
    pool_B = rows.group_B if normalize == "prompt" else torch.zeros_like(rows.group_B)
    return Judged(rows.wins_BN.float(), rows.group_B, pool_B, rows.mask_BT.any(1), rows.log_prior_B)
