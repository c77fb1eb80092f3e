"""Weights that a user gives by name."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def named_weights(weights: Mapping[str, float] | None, objectives: Sequence[str], default_N: Tensor) -> Tensor:
    """Weights in the objectives' order, float32, summing to 1.

    Args:
        weights: by name; ``None`` takes the default.
        objectives: names of the trained objectives, in order.
        default_N: the objectives' own weights.

    Raises:
        ValueError: a name is missing or unknown, a weight is negative or not finite, or all are 0.
    """
    if weights is None:
        values = [float(w) for w in default_N]
    else:
        unknown, missing = sorted(set(weights) - set(objectives)), sorted(set(objectives) - set(weights))
        if unknown or missing:
            raise ValueError(
                f"weights must name each trained objective once ({', '.join(objectives)})"
                + (f"; unknown: {', '.join(unknown)}" if unknown else "")
                + (f"; missing: {', '.join(missing)}" if missing else "")
            )
        values = [float(weights[name]) for name in objectives]
    for name, value in zip(objectives, values, strict=True):
        if not math.isfinite(value) or value < 0:
            raise ValueError(f"weight of objective '{name}' must be a finite number >= 0, got {value}")
    total = sum(values)
    if total == 0:
        raise ValueError("at least one objective needs a weight above 0; all are 0")
    return torch.tensor([value / total for value in values], dtype=torch.float32)
