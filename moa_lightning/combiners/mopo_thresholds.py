"""MOPO's thresholds: adaptive ones, and the warning of those that are not met.

Legend: N objectives.
"""

from collections.abc import Mapping, Sequence

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from moa_lightning.combiners.duals import DualUpdate
from moa_lightning.combiners.mopo_values import Judged
from moa_lightning.combiners.shared.constraints import running_mean, watched
from moa_lightning.errors import UserError
from moa_lightning.types import State


def require_probabilities(thresholds: Mapping[str, float]) -> None:
    """Refuse thresholds that are no win probabilities."""
    for name, threshold in thresholds.items():
        if not 0 < threshold < 1:
            raise UserError(f"MOPO.thresholds.{name} must lie in (0, 1), as a win probability; got {threshold}")


FEW_RESPONSES = 8
"""With fewer responses to a prompt than this, single votes leave the weights far from those of the true preferences."""


def warn_of_votes(batch: Judged, names: Sequence[str]) -> None:
    """Warn if labels are single votes among few responses: what that costs, and what to judge thresholds by."""
    votes_N, responses = batch.votes()
    named = [name for name, votes in zip(names, votes_N.tolist(), strict=True) if votes]
    if named and responses < FEW_RESPONSES:
        rank_zero_warn(
            f"MOPO's labels of {', '.join(map(repr, named))} are single votes among {responses:.2g} responses to a "
            "prompt. The weights follow each vote, so the policy stays farther from the constrained optimum, and the "
            "curve 'believed' is too high: judge thresholds by held-out values alone. Labels that are probabilities "
            "(moa label), or more responses to a prompt, help"
        )


def warn_of_unlabelled(state: State, patience: int, names: Sequence[str]) -> None:
    """Warn, once patience is at its end, of thresholds that no batch had a value for.

    Args:
        state: the combiner's, this batch counted in ``seen`` and not yet in ``batches``.
        patience: batches until the warning.
        names: of the objectives.
    """
    if int(state["batches"]) + 1 != patience:
        return
    for i in ((state["primary"] == 0) & state["thresholds"].isfinite() & (state["seen"] == 0)).nonzero().flatten():
        rank_zero_warn(
            f"MOPO's threshold {float(state['thresholds'][i]):.3g} for '{names[i]}' has not moved its multiplier: in "
            f"{patience} batches no prompt had this label for all of its responses. Label whole prompts (moa label "
            "fills in what is missing)"
        )


def threshold_memory(count: int) -> State:
    """First memory of the functions below, for so many objectives."""
    return {
        # Means over about the last `patience` batches: a single batch is too noisy to judge a threshold by.
        "mean_values": torch.zeros(count),
        "valued": torch.zeros(count),  # batches in this mean
        "mean_attainable": torch.zeros(count),  # if the best response to each prompt were always chosen
        "seen": torch.zeros(count),  # batches in this one
        # Of the reference, over the batches since the thresholds were last refreshed.
        "reference_values": torch.zeros(count),
        "reference_seen": torch.zeros(count),
    }


def evaluation_memory(count: int) -> State:
    """First memory of :func:`since_evaluation` and :func:`corrected`, for so many objectives."""
    return {
        "held_out": torch.full((count,), torch.nan),  # values at the last evaluation
        "gap": torch.zeros(count),  # these less what was believed in the batches before
        "mean_believed": torch.zeros(count),
        "believed_seen": torch.zeros(count),  # batches in this mean
    }


def since_evaluation(state: State, believed_N: Tensor) -> State:
    """Mean of the believed values over the batches since the last evaluation, this one included."""
    mean_N, seen_N = running_mean(state["mean_believed"], state["believed_seen"], believed_N, 2**24)
    return {"mean_believed": mean_N, "believed_seen": seen_N}


def corrected(state: State, held_out_N: Tensor) -> State:
    """What an evaluation teaches: how far the believed values lie from those on held-out prompts.

    Args:
        state: the combiner's.
        held_out_N: the policy's values on the held-out prompts; NaN where unknown.
    """
    known_N = held_out_N.isfinite() & (state["believed_seen"] > 0)
    gap_N = (held_out_N - state["mean_believed"]).where(known_N, state["gap"])
    zero_N = torch.zeros_like(gap_N)
    return {"held_out": held_out_N, "gap": gap_N, "mean_believed": zero_N, "believed_seen": zero_N.clone()}


def adapted(state: State, reference_N: Tensor, beta: float, refresh_interval: int) -> State:
    """Thresholds of ``beta`` times the reference's value, averaged since its last refresh, and what that takes.

    Args:
        state: the combiner's, ``batches`` and ``primary`` included.
        reference_N: the reference's values on this batch; NaN where unknown.
        beta: share of the reference's value.
        refresh_interval: batches between two refreshes of the reference.
    """
    refreshed = int(state["batches"]) % refresh_interval == 0
    seen_N = torch.zeros_like(state["reference_seen"]) if refreshed else state["reference_seen"]
    values_N, seen_N = running_mean(state["reference_values"], seen_N, reference_N, refresh_interval)
    known_N = (state["primary"] == 0) & (seen_N > 0)
    return {
        "reference_values": values_N,
        "reference_seen": seen_N,
        "thresholds": torch.where(known_N, beta * values_N, state["thresholds"]),
    }


def judged(
    state: State,
    attainable_N: Tensor,
    bound_N: Tensor,
    dual: DualUpdate,
    patience: int,
    radius: float,
    names: Sequence[str],
) -> State:
    """What is remembered of this batch's values; warns of a threshold that no policy meets, or that stays violated.

    Args:
        state: the combiner's, with this batch's ``values``.
        attainable_N: mean of each objective if the best response to each prompt, by these labels, were always chosen:
            no less than what any policy has.
        bound_N: bool, objectives with a threshold and a value.
        dual: how the multipliers move.
        patience: batches in the means, and violated ones until the warning.
        radius: of the robust value.
        names: of the objectives.
    """
    values_N, valued_N = running_mean(state["mean_values"], state["valued"], state["values"], patience)
    attainable_N, seen_N = running_mean(state["mean_attainable"], state["seen"], attainable_N, patience)
    settled_N = bound_N & (seen_N >= patience)
    impossible_N = settled_N & (attainable_N < state["thresholds"])

    def message(i: int, best: float) -> str:
        why = (
            f"always choosing the best response to each prompt, by these very labels, would give only "
            f"{float(attainable_N[i]):.3g}"
            if impossible_N[i]
            else f"its multiplier has been at its largest for {patience} batches"
        )
        return (
            f"MOPO's threshold {float(state['thresholds'][i]):.3g} for '{names[i]}' cannot be met: {why}; the best "
            f"value reached, as a mean over {patience} batches, is {best:.3g}. Lower the threshold"
            + (f", or the radius {radius:g}" if radius else "")
        )

    return {
        "mean_values": values_N,
        "valued": valued_N,
        "mean_attainable": attainable_N,
        "seen": seen_N,
        **watched(state, values_N, settled_N, dual, patience, message, impossible_N),
    }
