"""Batches whose objectives have given gradients."""

import torch

from moa_lightning.signals import Signals

WORKED = ([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]], [[1.0, 0.0, 0.0], [0.0, 2.0, 0.0], [-0.5, -0.5, 1.0]])


def combine(combiner, jacobian, weights=None):
    """One token whose N gradients are the rows of ``jacobian``; its advantages are all 1."""
    jacobian = torch.as_tensor(jacobian, dtype=torch.float64)
    count = len(jacobian)
    given = Signals(
        mask_BT=torch.ones(1, 1, dtype=torch.bool),
        valid_BN=torch.ones(1, count, dtype=torch.bool),
        advantages_BTN=torch.ones(1, 1, count),
        ratio_BT=torch.ones(1, 1),
        gramian=lambda _: jacobian @ jacobian.T,
    )
    start = combiner.init([f"o{i}" for i in range(count)], torch.ones(count) if weights is None else weights)
    return combiner.combine(given, start)


def direction(combiner, jacobian):
    """Of the update, in the gradients' space."""
    return combine(combiner, jacobian).mean_weights().double() @ torch.as_tensor(jacobian, dtype=torch.float64)
