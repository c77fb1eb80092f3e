"""Base class of rewards with a frozen model: placement on devices, and scoring in batches."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from moa_lightning.distributed import all_max
from moa_lightning.rewards.base import Reward, ShardModel


class RewardWithModel(Reward):
    """A reward with a frozen model: a full copy on each process, or sharded over all of them."""

    batch_size: int
    _model: Any = None
    _device = torch.device("cpu")
    _forward_context: Any = None  # of a sharded model: gives the context manager for its forward passes

    @abstractmethod
    def _load(self) -> nn.Module:
        """Load the model into CPU memory. Called once, after :meth:`check`."""

    def _sharded_module(self) -> nn.Module:
        """The part of the model that is sharded."""
        return self._model  # type: ignore[no-any-return]  # as loaded

    def setup(self, device: torch.device) -> None:
        """Load the weights on the first call, and move them to the device unless they are sharded."""
        self._read()
        self._device = device
        if self._forward_context is None:
            self._model.to(device)

    def shard(self, shard_model: ShardModel) -> None:
        """Load the weights and shard them."""
        if self._forward_context is None:
            self._read()
            self._forward_context = shard_model(self._sharded_module())

    def _read(self) -> None:
        if self._model is None:
            self.check(set())
            self._model = self._load().eval().requires_grad_(False)

    @torch.no_grad()
    def _in_batches(
        self, lengths: Sequence[int], score: Callable[[list[int]], list[float]], placeholder_pass: Callable[[], object]
    ) -> list[float | None]:
        """Score texts in batches. Returns the scores in the order of the texts; ``None`` for texts without tokens.

        Args:
            lengths: of the texts, in tokens.
            score: scores the texts with these indices in one forward pass.
            placeholder_pass: runs a forward pass on a placeholder batch, so that processes that share a sharded model
                run equally many.
        """
        # Texts of similar length share a batch, for less padding. The longest come first, to run out of memory early.
        order = sorted((i for i, length in enumerate(lengths) if length), key=lambda i: -lengths[i])
        batches = [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        scores: list[float | None] = [None] * len(lengths)
        context = self._forward_context(self._sharded_module()) if self._forward_context else nullcontext(False)
        with context as in_step:
            passes = all_max(len(batches), self._device) if in_step else len(batches)
            for rows in batches:
                for i, found in zip(rows, score(rows), strict=True):
                    scores[i] = found
            for _ in range(passes - len(batches)):
                placeholder_pass()
        return scores
