"""What CAID keeps of the reference: its responses with their scores, and the problem on them.

Legend: B sequences, R kept responses of C columns, N objectives, M of them with a threshold.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from moa_lightning.combiners.responses import ScoredResponses
from moa_lightning.distributed import all_rows, rank
from moa_lightning.functional.dual import DualSolution, one_shot_dual
from moa_lightning.functional.preference import group_max, group_softmax
from moa_lightning.types import Experience, State


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

    scores_RN: Tensor  # without penalties; a missing one is the mean of the prompt's others
    present_RN: Tensor  # bool: False in prompts that an objective did not score at all
    penalty_R: Tensor
    log_prior_R: Tensor
    group_R: Tensor

    @classmethod
    def of(cls, samples_RC: Tensor) -> "ReferenceSamples":
        """From what :func:`with_responses` gives."""
        raw_RN, group_R = samples_RC[:, :-3].double(), samples_RC[:, -1].long()
        scores_RN, present_RN = ScoredResponses(raw_RN.nan_to_num(), raw_RN.isfinite(), group_R).filled()
        return cls(scores_RN, present_RN, samples_RC[:, -3].double(), samples_RC[:, -2].double(), group_R)

    def means(self) -> Tensor:
        """Mean of each objective under the reference, over the prompts that have it; NaN where none has."""
        prior_RN = group_softmax(self.log_prior_R, self.group_R).unsqueeze(1) * self.present_RN
        return (prior_RN * self.scores_RN).sum(0) / prior_RN.sum(0)

    def attainable(self) -> Tensor:
        """Mean of each objective if the best response to each prompt were always chosen."""
        best_GN = group_max(self.scores_RN.where(self.present_RN, -torch.inf), self.group_R)
        found_GN = best_GN.isfinite()
        return best_GN.where(found_GN, 0.0).sum(0) / found_GN.sum(0)

    def solve(self, primary_N: Tensor, thresholds_N: Tensor, beta: float) -> tuple[Tensor, DualSolution]:
        """Multipliers of all objectives, 0 where there is no threshold, and the solution for those that have one.

        In a prompt that an objective did not score its term is left out, as it is in the training.
        """
        bound_N = thresholds_N.isfinite()
        excess_RM = (self.scores_RN - thresholds_N).where(self.present_RN, 0.0)[:, bound_N]
        primary_R = (self.scores_RN * primary_N).where(self.present_RN, 0.0).sum(1) - self.penalty_R
        nothing_M = excess_RM.new_zeros(excess_RM.shape[1])
        found = one_shot_dual(primary_R, excess_RM, nothing_M, beta, self.group_R, self.log_prior_R)
        duals_N = torch.zeros_like(thresholds_N)
        duals_N[bound_N] = found.duals.float()
        return duals_N, found


def solved(state: State, beta: Tensor, fixed: bool, largest: float, names: Sequence[str]) -> State:
    """Multipliers for the kept responses, and what else is known then; warns of thresholds that are out of reach.

    Args:
        state: the combiner's, with its ``samples``.
        beta: strength of the KL charge.
        fixed: whether the thresholds are given; else they are what the reference has.
        largest: a multiplier may be.
        names: of the objectives.
    """
    reference, thresholds_N = ReferenceSamples.of(state["samples"]), state["thresholds"]
    if not fixed:
        # Rounded down, so that the reference itself meets them.
        rounded_N = torch.nextafter(reference.means().float(), torch.tensor(-torch.inf))
        thresholds_N = rounded_N.where(state["primary"] == 0, torch.nan)
    duals_N, found = reference.solve(state["primary"], thresholds_N, float(beta))
    beyond_N = duals_N > largest
    for i in (beyond_N & (state["warned"] == 0)).nonzero().flatten().tolist():
        rank_zero_warn(
            f"CAID's threshold {float(thresholds_N[i]):.3g} for '{names[i]}' "
            + (
                f"takes a multiplier of {float(duals_N[i]):.3g}, and {largest:g} is the largest of its dual step; let "
                "that grow larger, or lower the threshold"
                if found.feasible
                else "cannot be met, with the others, on the responses of the reference: always choosing the best one "
                f"to each prompt would give {float(reference.attainable()[i]):.3g}; lower it, or raise "
                "source.num_generations"
            )
        )
    return {
        "thresholds": thresholds_N,
        "duals": duals_N.clamp(max=largest),
        "beta": beta,
        "warned": state["warned"].masked_fill(beyond_N, 1.0),
    }
