"""Pareto measures of points to be maximised, computed by moocore.

Legend: P points, N objectives.
"""

import moocore
import numpy as np
import torch
from torch import Tensor


def hypervolume(points_PN: Tensor, reference_N: Tensor) -> float:
    """Volume that the points dominate above the reference point (maximisation).

    Args:
        points_PN: objective vectors, bigger is better; P may be 0.
        reference_N: the fixed reference point. A point that is not better in every objective contributes nothing and
            is not an error.

    Returns:
        The volume, in the product of the objectives' units.

    Raises:
        ValueError: the shapes do not agree or a value is not finite.

    Source: moocore's `hypervolume` (Fonseca et al. 2006), on the negated points.

    Example:
        >>> hypervolume(torch.tensor([[2.0, 1.0], [1.0, 2.0]]), torch.tensor([0.0, 0.0]))
        3.0
    """
    points, reference = torch.as_tensor(points_PN), torch.as_tensor(reference_N)
    if points.ndim != 2 or reference.shape != points.shape[1:]:
        raise ValueError(
            f"hypervolume needs points (P, N) and a reference (N,); got {tuple(points.shape)} and "
            f"{tuple(reference.shape)}"
        )
    _require_finite(points, "hypervolume: points")
    _require_finite(reference, "hypervolume: reference")
    gains = _to_numpy(points) - _to_numpy(reference)
    gains = gains[(gains > 0).all(axis=1)]
    if len(gains) == 0:
        return 0.0
    if gains.shape[1] == 1:  # moocore starts at two objectives
        return float(gains.max())
    return float(moocore.hypervolume(gains, ref=np.zeros(gains.shape[1]), maximise=True))


def non_dominated(points_PN: Tensor) -> Tensor:
    """Mask of the points that no other point dominates (maximisation).

    A point is dominated if another one is at least as good everywhere and better somewhere; duplicates of a
    non-dominated point are all kept.

    Args:
        points_PN: objective vectors, bigger is better; P may be 0.

    Returns:
        mask_P, bool, on the device of the points.

    Raises:
        ValueError: not two-dimensional, or a value is not finite.

    Source: moocore's `is_nondominated`.
    """
    points = torch.as_tensor(points_PN)
    if points.ndim != 2:
        raise ValueError(f"non_dominated needs points (P, N), got {tuple(points.shape)}")
    _require_finite(points, "non_dominated: points")
    if len(points) == 0:
        return torch.zeros(0, dtype=torch.bool, device=points.device)
    if points.shape[1] == 1:
        return (points == points.max(dim=0).values).squeeze(1)
    mask = moocore.is_nondominated(_to_numpy(points), maximise=True, keep_weakly=True)
    return torch.as_tensor(np.asarray(mask, dtype=bool), device=points.device)


def _to_numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().double().numpy()


def _require_finite(tensor: Tensor, what: str) -> None:
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{what} must be finite; drop rows with NaN or inf first")
