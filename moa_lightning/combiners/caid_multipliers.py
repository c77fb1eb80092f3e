"""CAID's multipliers: from the dual on the responses that it kept of the reference, and by dual steps afterwards.

Legend: R kept responses, N objectives, M of them with a threshold, G prompts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from moa_lightning.combiners.caid_samples import ReferenceSamples
from moa_lightning.combiners.duals import DualUpdate
from moa_lightning.combiners.shared.constraints import at_its_largest, watched
from moa_lightning.functional.dual import one_shot_dual
from moa_lightning.functional.preference import group_max
from moa_lightning.types import State


@dataclass(frozen=True)
class Start:
    """What the kept responses say of the multipliers."""

    duals_N: Tensor  # 0 where there is no threshold
    feasible: bool  # whether some policy on these responses meets all thresholds
    attainable_N: Tensor  # mean of each objective if the best response were always chosen


def start(
    samples: ReferenceSamples, primary_N: Tensor, thresholds_N: Tensor, beta: float, fixed: bool, pool_prompts: bool
) -> Start | None:
    """Solve the dual; None where no response has the scores that a threshold takes.

    A missing score does not say what a policy would have, so nothing is put in its place. Pooled, only responses count
    that have all the scores that the problem takes. By prompt, one where only some of the responses have an objective's
    score counts in no expectation of it; where none has, the objective's term is left out, as in training.

    Args:
        samples: the kept responses.
        primary_N: 1 for the primary objective, else 0.
        thresholds_N: least means; NaN where there is none.
        beta: strength of the KL charge.
        fixed: whether the thresholds are given; else they are the means of these very responses, penalties included.
        pool_prompts: take what responses add to their prompt's level as samples of one distribution for all prompts.
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
    return Start(duals_N, found.feasible, best_GN.where(known_GN, 0.0).sum(0) / known_GN.sum(0))


def solved(
    state: State, beta: Tensor, fixed: bool, pool_prompts: bool, dual: DualUpdate, names: Sequence[str]
) -> State:
    """Multipliers for the kept responses, and what else is known then; warns of what these cannot tell.

    A multiplier that they do not support is at most the one that gives its objective the primary one's spread: large
    enough to move the policy, and too small to make all else irrelevant.

    Args:
        state: the combiner's, with its ``samples``.
        beta: strength of the KL charge.
        fixed: whether the thresholds are given; else they are what the reference has.
        pool_prompts: as in :func:`start`.
        dual: has the largest multiplier, in spreads.
        names: of the objectives.
    """
    samples, thresholds_N = ReferenceSamples.of(state["samples"]), state["thresholds"]
    if not fixed:
        means_N = samples.without_penalties().means(samples.present_RN).float()
        thresholds_N = means_N.where(state["primary"] == 0, torch.nan)
    deviations_N = samples.deviations().float()
    units_N = (deviations_N @ state["primary"]) / deviations_N
    units_N = units_N.where(units_N.isfinite() & (units_N > 0), 1.0)
    found = start(samples, state["primary"], thresholds_N, float(beta), fixed, pool_prompts)
    asked_N = units_N * thresholds_N.isfinite() if found is None else found.duals_N
    largest_N = units_N * (dual.largest if found is not None and found.feasible else min(1.0, dual.largest))
    first_N = asked_N.minimum(largest_N)
    beyond_N = (asked_N > largest_N) | (thresholds_N.isfinite() & (found is None))
    for i in (beyond_N & (state["warned"] == 0)).nonzero().flatten().tolist():
        why = _doubt(found, i, float(largest_N[i]))
        starts = f"Its multiplier starts at {float(first_N[i]):.3g}"
        rank_zero_warn(f"CAID's threshold {float(thresholds_N[i]):.3g} for '{names[i]}' {why}. {starts}")
    return {
        "thresholds": thresholds_N,
        "duals": first_N,
        "units": units_N,
        "beta": beta,
        "scored": (samples.scored_RN if pool_prompts else samples.complete()).float().mean(0),
        "warned": state["warned"].masked_fill(beyond_N, 1.0),
    }


def _doubt(found: Start | None, i: int, largest: float) -> str:
    """Why the kept responses cannot tell an objective's multiplier, and what helps."""
    if found is None:
        return "has no responses with all the scores that it takes"
    if found.feasible:
        return (
            f"takes a multiplier of {float(found.duals_N[i]):.3g}, and its dual step's largest is {largest:.3g}; let "
            "that grow larger, or lower the threshold"
        )
    return (
        "cannot be met, with the others, on the responses of the reference: always choosing the best one would give "
        f"{float(found.attainable_N[i]):.3g}; lower it, or raise source.num_generations or reference_batches"
    )


def stepped(
    state: State, recent_N: Tensor, dual: DualUpdate, window: int, patience: int, names: Sequence[str]
) -> State:
    """State after one dual step, which is taken in spreads; warns of thresholds that stay violated.

    Args:
        state: the combiner's.
        recent_N: values that the step follows.
        dual: how the multipliers move.
        window: batches in the state's ``values``.
        patience: dual steps violated, with the multiplier at its largest, until the warning.
        names: of the objectives.
    """
    scaled = state | {"duals": state["duals"] / state["units"]}
    scaled |= dual.stepped(scaled, recent_N - state["thresholds"])
    message = at_its_largest("CAID", scaled, names, dual, window, f"{patience} dual steps")
    scaled |= watched(scaled, state["values"], state["values"].isfinite(), dual, patience, message)
    return scaled | {"duals": scaled["duals"] * state["units"]}
