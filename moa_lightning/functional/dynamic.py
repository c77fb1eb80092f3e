"""Dynamic reward weighting: weights adapted by gradients, and a factor from the front's growth.

Legend: N objectives.
"""

import math

import torch
from torch import Tensor

from moa_lightning.functional.pareto import hypervolume, non_dominated


def influence(gram_NN: Tensor) -> Tensor:
    """How much a step along the sum of all gradients improves each objective: ``g_i . sum_j g_j``, dimensionless.

    Args:
        gram_NN: inner products of the objectives' gradients.

    Returns:
        influence_N, in units of the mean squared gradient norm; 0 if all gradients are 0. Its sum is at least 0,
        because it is the squared norm of the sum.

    Source: Lu et al. 2025, "Learning to Optimize Multi-Objective Alignment Through Dynamic Reward Weighting",
    arXiv 2509.11452. Deviation: the paper's has the units of the gradients, and so depends on the size of the model.

    Example: the second gradient is opposed to the first and shorter.
        >>> influence(torch.tensor([[1.0, -0.5], [-0.5, 0.25]]).double()).tolist()
        [0.8, -0.4]
    """
    size = gram_NN.diagonal().mean()
    return gram_NN.sum(1) / torch.where(size > 0, size, 1.0)


def mirror_step(log_weights_N: Tensor, influence_N: Tensor, lr: float) -> Tensor:
    """``log w_i += lr influence_i``, the weights divided by their sum: mirror descent on the simplex.

    Args:
        log_weights_N: -inf stays -inf.
        influence_N: without unit.
        lr: step; the paper's learning rate over its regularisation mu.

    Source: Lu et al. 2025, arXiv 2509.11452.

    Example:
        >>> equal, opposed = torch.tensor([0.5, 0.5]).log(), torch.tensor([1.0, -1.0])
        >>> [round(w, 6) for w in mirror_step(equal, opposed, math.log(3) / 2).exp().tolist()]
        [0.75, 0.25]
    """
    return (log_weights_N + lr * influence_N).log_softmax(0)


def grow_front(front_AN: Tensor, point_N: Tensor, reference_N: Tensor) -> tuple[Tensor, float]:
    """Add a point to a front; returns the new front and the growth of its hypervolume.

    Args:
        front_AN: points that do not dominate each other; A may be 0.
        point_N: the new point.
        reference_N: reference point of the hypervolume.

    Returns:
        The non-dominated points, without duplicates, and the growth, at least 0.

    Example:
        >>> front, origin = torch.tensor([[2.0, 1.0]]), torch.zeros(2)
        >>> grow_front(front, torch.tensor([1.0, 2.0]), origin)[1], grow_front(front, torch.ones(2), origin)[1]
        (1.0, 0.0)
    """
    points_AN = torch.cat([front_AN, point_N.unsqueeze(0)])
    grown_AN = points_AN[non_dominated(points_AN)].unique(dim=0)
    return grown_AN, max(hypervolume(grown_AN, reference_N) - hypervolume(front_AN, reference_N), 0.0)


def front_factor(growth: float, scale: float) -> float:
    """``0.5 + 1.5 tanh(growth / scale)``: half for an evaluation that added nothing to the front, at most double.

    Args:
        growth: of the hypervolume, at least 0.
        scale: above 0, in the same units.

    Source: Lu et al. 2025, arXiv 2509.11452, where the scale is 1.

    Example:
        >>> front_factor(0.0, 1.0), round(front_factor(0.5, 1.0), 6)
        (0.5, 1.193176)
    """
    return 0.5 + 1.5 * math.tanh(growth / scale)
