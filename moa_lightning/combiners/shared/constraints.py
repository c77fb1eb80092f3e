"""What the constrained combiners share: their first state, its curves, and the warning of thresholds that are not met.

Legend: B sequences, N objectives, W batches of a window.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from moa_lightning.combiners.base import Combiner
from moa_lightning.combiners.duals import DualUpdate
from moa_lightning.combiners.shared.named import primary_and_thresholds
from moa_lightning.distributed import all_sum
from moa_lightning.types import Experience, State


def init_constraints(
    combiner: Combiner,
    primary: str | None,
    thresholds: Mapping[str, float] | None,
    dual: DualUpdate,
    objectives: Sequence[str],
) -> State:
    """First state of a combiner that maximises one objective while others stay above their thresholds.

    Args:
        combiner: whose settings they are.
        primary: name; ``None`` is the first objective.
        thresholds: by name; ``None`` will be found for each objective but the primary one.
        dual: how the multipliers move.
        objectives: names of the trained objectives, in order.

    Raises:
        UserError: a name is no objective, or the primary objective has a threshold.
    """
    primary_N, thresholds_N = primary_and_thresholds(combiner, primary, thresholds, objectives)
    bound_N = primary_N == 0 if thresholds is None else thresholds_N.isfinite()
    return {
        "primary": primary_N,
        "duals": bound_N * dual.start,
        **dual.init(len(objectives)),
        "thresholds": thresholds_N,  # NaN: none (yet)
        "values": torch.full_like(primary_N, torch.nan),  # what they are compared with
        "spreads": torch.ones_like(primary_N),  # of the values, between responses
        "spread_seen": torch.zeros_like(primary_N),  # batches in these
        "batches": torch.zeros(()),
        "best": torch.full_like(primary_N, -torch.inf),  # of the values
        **{name: torch.zeros_like(primary_N) for name in ("stuck", "warned")},
    }


def rename_old_entries(saved: State) -> State:
    """A checkpoint's state with the memory of ``LogPID`` under its present names.

    Older checkpoints have it under names that ``PID`` uses too; ``dual_change`` was ``LogPID``'s alone.
    """
    if "dual_change" not in saved:
        return saved
    names = {f"dual_{name}": f"log_pid_{name}" for name in ("slack", "sum", "change")}
    return {names.get(name, name): value for name, value in saved.items()}


def slide_window(window_W2N: Tensor, experience: Experience) -> tuple[Tensor, Tensor]:
    """Sums of scores and numbers of responses of the last W batches with this one, and their means over all processes.

    Scores are in the objectives' own units, without penalties; an objective that scored no response has mean NaN.
    """
    scores_BN, valid_BN = experience.rewards.trained_BN, experience.valid_BN
    sums_2N = all_sum(torch.stack([scores_BN.where(valid_BN, 0.0).sum(0), valid_BN.to(scores_BN).sum(0)]))
    window_W2N = torch.cat([window_W2N[1:], sums_2N.cpu().unsqueeze(0)])
    return window_W2N, torch.div(*window_W2N.sum(0))


SPREAD_BATCHES = 50
"""Batches that the spread of a value is averaged over; much slower than multipliers, whose gains it scales."""


def update_spreads(state: State, values_BN: Tensor, valid_BN: Tensor) -> State:
    """Standard deviation of each objective's values between responses, averaged over batches and all processes.

    It is the root of the mean variance within a batch: over all batches so far that tell one, exponential after 50. A
    floor keeps an objective that is constant from a division by 0.

    Args:
        state: after the last batch.
        values_BN: of this batch.
        valid_BN: bool, values that count.
    """
    count_N = all_sum(valid_BN.to(values_BN).sum(0))
    mean_N = all_sum(values_BN.where(valid_BN, 0.0).sum(0)) / count_N
    variance_N = all_sum((values_BN - mean_N).where(valid_BN, 0.0).square().sum(0)) / count_N
    known_N = (count_N > 1).cpu()
    seen_N = state["spread_seen"] + known_N
    square_N = state["spreads"].square()
    share_N = 1 / seen_N.clamp(min=1, max=SPREAD_BATCHES)
    square_N = torch.where(known_N, square_N + share_N * (variance_N.cpu() - square_N), square_N)
    return {"spreads": square_N.sqrt().clamp(min=1e-6), "spread_seen": seen_N}


def constraint_curves(state: State) -> dict[str, Tensor]:
    """Multipliers, thresholds, and the values that they are compared with."""
    bound_N = (state["primary"] == 0) & state["thresholds"].isfinite()
    duals_N = state["duals"].where(bound_N, torch.nan)
    return {"duals": duals_N, "thresholds": state["thresholds"], "values": state["values"]}


def warn_if_stuck(
    state: State,
    values_N: Tensor,
    known_N: Tensor,
    dual: DualUpdate,
    patience: int,
    message: Callable[[int, float], str],
    impossible_N: Tensor | None = None,
) -> State:
    """Count the batches that each threshold is violated, and warn once of one that stays so.

    Args:
        state: holds what :func:`init_constraints` returned, and since then the last call.
        values_N: what the thresholds are compared with; NaN where unknown.
        known_N: bool, values that enough batches stand behind.
        dual: how the multipliers move.
        patience: batches violated, with the multiplier at its largest, until the warning.
        message: of an objective by its index, with the best value that it reached.
        impossible_N: bool, thresholds to warn of at once.
    """
    best_N = torch.fmax(state["best"], values_N).where(known_N, state["best"])
    stuck_N = dual.stuck(state["duals"], known_N & (values_N < state["thresholds"]), state["stuck"])
    named_N = stuck_N >= patience if impossible_N is None else (stuck_N >= patience) | impossible_N
    named_N = named_N & (state["warned"] == 0)
    for i in named_N.nonzero().flatten().tolist():
        from lightning.pytorch.utilities import rank_zero_warn

        rank_zero_warn(message(i, float(best_N[i])))
    return {"best": best_N, "stuck": stuck_N, "warned": state["warned"].masked_fill(named_N, 1.0)}


def stuck_message(
    title: str, state: State, names: Sequence[str], dual: DualUpdate, window: int, patience: str
) -> Callable[[int, float], str]:
    """The message that a multiplier has been at its largest for so long."""

    def message(i: int, best: float) -> str:
        return (
            f"{title}'s threshold {state['thresholds'][i]:.3g} for '{names[i]}' is not met: its multiplier has been "
            f"{dual.largest:g}, its largest, for {patience}; the best mean of {window} is {best:.3g}. Lower the "
            "threshold, or let the dual step's multiplier grow larger"
        )

    return message


def running_mean(mean_N: Tensor, seen_N: Tensor, new_N: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Plain mean of the first ``window`` values, exponential after them, and how many are in it; NaN is no value."""
    known_N = new_N.isfinite()
    count_N = (seen_N + known_N).clamp(max=window)
    return torch.where(known_N, mean_N + (new_N - mean_N) / count_N.clamp(min=1), mean_N), count_N
