"""Where the time goes."""

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from moa_lightning.types import Minibatch


class Throughput(Callback):
    """Logs tokens per second, and the shares of time spent on generation, scoring, other forward passes and learning.

    Each collected batch closes an interval that began with the one before it; evaluations are not counted. Tokens
    are those of the responses, over all processes: ``throughput/tokens_per_second`` counts them against all the
    time, ``throughput/generated_tokens_per_second`` against that of generation alone.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._tokens = 0.0
        self._started = 0.0
        self.total_tokens = 0.0
        self.total_seconds = 0.0

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Minibatch, batch_idx: int
    ) -> None:
        """A collected batch ends the interval before it."""
        self._started = time.perf_counter()
        if batch.collected is not None:
            self._log(pl_module)
            self._seconds = dict(batch.collected.seconds)
            self._tokens = batch.collected.tokens

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Minibatch, batch_idx: int
    ) -> None:
        """Add the update's time."""
        self._seconds["learning"] = self._seconds.get("learning", 0.0) + time.perf_counter() - self._started

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count the last interval."""
        self._close()

    def _log(self, pl_module: LightningModule) -> None:
        total = sum(self._seconds.values())
        if total <= 0 or not self._tokens:
            return
        metrics = {f"throughput/share_{name}": seconds / total for name, seconds in self._seconds.items()}
        metrics["throughput/tokens_per_second"] = self._tokens / total
        if self._seconds.get("generation", 0.0) > 0:
            metrics["throughput/generated_tokens_per_second"] = self._tokens / self._seconds["generation"]
        pl_module.log_dict(metrics, batch_size=1, rank_zero_only=True)
        self._close()

    def _close(self) -> None:
        self.total_tokens += self._tokens
        self.total_seconds += sum(self._seconds.values())
        self._seconds, self._tokens = {}, 0.0
