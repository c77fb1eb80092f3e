"""Weights and thresholds that a user gives by name."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from moa_lightning.combiners.base import Combiner
from moa_lightning.errors import UserError
from moa_lightning.schedules import Weight, weight_at


def named_weights(
    weights: Mapping[str, Weight] | None, objectives: Sequence[str], default_N: Tensor, progress: float = 0.0
) -> Tensor:
    """Weights in the objectives' order, float32, summing to 1.

    Args:
        weights: by name; ``None`` takes the default.
        objectives: names of the trained objectives, in order.
        default_N: the objectives' own weights, at this progress.
        progress: share of the run that is done, for schedules.

    Raises:
        UserError: a name is missing or unknown, a weight or their sum is negative or not finite, or all are 0.
    """
    if weights is None:
        values = [float(w) for w in default_N]
    else:
        unknown, missing = sorted(set(weights) - set(objectives)), sorted(set(objectives) - set(weights))
        if unknown or missing:
            raise UserError(
                f"weights must name each trained objective once ({', '.join(objectives)})"
                + (f"; unknown: {', '.join(unknown)}" if unknown else "")
                + (f"; missing: {', '.join(missing)}" if missing else "")
            )
        values = [weight_at(weights[name], progress) for name in objectives]
    when = f" at progress {progress:.3g}" if progress else ""
    for name, value in zip(objectives, values, strict=True):
        if not math.isfinite(value) or value < 0:
            raise UserError(f"weight of objective '{name}' must be a finite number >= 0, got {value}{when}")
    total = sum(values)
    if total == 0:
        raise UserError(f"at least one objective needs a weight above 0; all are 0{when}")
    if total == math.inf:
        raise UserError(f"the weights' sum is not finite{when}; give smaller ones, since only their ratios count")
    return torch.tensor([value / total for value in values], dtype=torch.float32)


def primary_and_thresholds(
    combiner: Combiner, primary: str | None, thresholds: Mapping[str, float] | None, objectives: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """Which objective is maximised (1, the others 0), and the others' thresholds (NaN: none), in their order.

    Args:
        combiner: whose settings they are.
        primary: name; ``None`` is the first objective.
        thresholds: by name.
        objectives: names of the trained objectives, in order.

    Raises:
        UserError: a name is no objective, the primary objective has a threshold, or a threshold is not finite.
    """
    title, known = type(combiner).__name__, ", ".join(objectives)
    primary, thresholds = objectives[0] if primary is None else primary, thresholds or {}
    if primary not in objectives:
        raise UserError(f"{title}.primary '{primary}' is no trained objective; they are {known}")
    for name, threshold in thresholds.items():
        if name not in objectives:
            raise UserError(f"{title}.thresholds names '{name}', which is no trained objective; they are {known}")
        if name == primary:
            raise UserError(f"{title}.thresholds names '{name}', the primary objective, which is maximised; remove it")
        if not math.isfinite(threshold):
            raise UserError(f"{title}.thresholds.{name} must be a finite number, got {threshold}")
    return (
        torch.tensor([float(name == primary) for name in objectives]),
        torch.tensor([thresholds.get(name, torch.nan) for name in objectives]),
    )


def named_point(setting: str, point: Mapping[str, float] | None, objectives: Sequence[str], why_not: str) -> Tensor:
    """Coordinates that a user gave by name, in the objectives' order; NaN where none was given.

    Args:
        setting: what it is called, for the errors.
        point: by name, in the objectives' units; ``None`` gives none.
        objectives: names of the trained objectives, in order.
        why_not: what leaving an objective out means, for the errors.

    Raises:
        UserError: a name is no trained objective, or a coordinate is not finite.
    """
    for name, value in (point or {}).items():
        if name not in objectives:
            raise UserError(
                f"{setting} names '{name}', which is no trained objective; they are {', '.join(objectives)}"
            )
        if not math.isfinite(value):
            raise UserError(f"{setting}.{name} must be a finite number, got {value}; leave the objective out {why_not}")
    return torch.tensor([float((point or {}).get(name, math.nan)) for name in objectives], dtype=torch.float32)
