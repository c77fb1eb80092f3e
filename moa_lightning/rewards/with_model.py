"""What rewards with a frozen model of their own share: where it is, and scoring in batches."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from moa_lightning.distributed import all_max
from moa_lightning.rewards.base import Cut, Reward


class RewardWithModel(Reward):
    """A reward with a frozen model: whole on each process, or in pieces over all of them."""

    batch_size: int
    _model: Any = None
    _device = torch.device("cpu")
    _together: Any = None  # of a model in pieces: what surrounds its forward passes

    @abstractmethod
    def _load(self) -> nn.Module:
        """The model, in main memory. Called once, after :meth:`check`."""

    def _to_cut(self) -> nn.Module:
        """The part of the model that is cut into pieces."""
        return self._model  # type: ignore[no-any-return]  # as loaded

    def setup(self, device: torch.device) -> None:
        """Load the weights, the first time, and move them to the device."""
        self._read()
        self._device = device
        if self._together is None:
            self._model.to(device)

    def shard(self, cut: Cut) -> None:
        """Load the weights and cut them into pieces."""
        if self._together is None:
            self._read()
            self._together = cut(self._to_cut())

    def _read(self) -> None:
        if self._model is None:
            self.check(set())
            self._model = self._load().eval().requires_grad_(False)

    @torch.no_grad()
    def _in_batches(
        self, lengths: Sequence[int], score: Callable[[list[int]], list[float]], stand_in: Callable[[], object]
    ) -> list[float | None]:
        """Scores of so many texts, in their order; texts without tokens have none.

        Args:
            lengths: of the texts, in tokens.
            score: the texts of these indices, in one forward pass.
            stand_in: a forward pass that counts nowhere, for processes that hold pieces and wait for this one's.
        """
        # Texts of similar length together: less padding. The longest first: too little memory shows at once.
        order = sorted((i for i, length in enumerate(lengths) if length), key=lambda i: -lengths[i])
        batches = [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        scores: list[float | None] = [None] * len(lengths)
        with nullcontext(False) if self._together is None else self._together(self._to_cut()) as in_step:
            passes = all_max(len(batches), self._device) if in_step else len(batches)
            for rows in batches:
                for i, found in zip(rows, score(rows), strict=True):
                    scores[i] = found
            for _ in range(passes - len(batches)):
                stand_in()
        return scores
