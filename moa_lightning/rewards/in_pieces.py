"""Models of rewards that processes hold in pieces."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from moa_lightning.distributed import all_most
from moa_lightning.rewards.base import Cut


class InPieces:
    """A reward's model, cut into pieces over the processes.

    Args:
        model: the model; it is changed in place.
        cut: what cuts it.
    """

    def __init__(self, model: nn.Module, cut: Cut) -> None:
        self.model = model
        self._together = cut(model)

    @contextmanager
    def passes(self, mine: int, device: Any) -> Iterator[int]:
        """Within it the model answers; yields how many forward passes to run beside one's own, for the others."""
        with self._together(self.model) as in_step:
            yield all_most(mine, torch.device(device)) - mine if in_step else 0
