"""What all callbacks that look at evaluations share.

Legend: B responses, N objectives (eval-only ones included).
"""

from abc import abstractmethod
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from moa_lightning.types import Evaluation, Statistics


class EvaluationCallback(Callback):
    """Gathers evaluation batches and hands the whole to :meth:`on_evaluation`, after validation and sanity check."""

    def __init__(self) -> None:
        self._batches: list[Evaluation] = []

    @abstractmethod
    def on_evaluation(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        statistics: dict[str, Statistics],
        batches: list[Evaluation],
    ) -> None:
        """An evaluation has ended; ``batches`` are those of this process. :func:`step_of` is its step."""

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start afresh."""
        self._batches = []

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep what the module evaluated."""
        assert isinstance(outputs, Evaluation)
        self._batches.append(outputs)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sum up."""
        if self._batches:
            module: Any = pl_module
            self.on_evaluation(trainer, pl_module, module.evaluation_statistics(), self._batches)
        self._batches = []


def step_of(trainer: Trainer, pl_module: LightningModule) -> int:
    """Updates of the weights: of the run, or of the checkpoint that is evaluated alone."""
    return int(getattr(pl_module, "steps_done", trainer.global_step))


def log_everywhere(trainer: Trainer, pl_module: LightningModule, metrics: dict[str, float]) -> None:
    """Log metrics of an evaluation; Lightning drops those of the sanity check, so they go to the loggers directly.

    Their step is the number of updates before the evaluation: the module logs it, and with it all that is logged here.

    All processes log, since each of them monitors; they have the same values, which their maximum leaves as they are.
    """
    if trainer.sanity_checking:
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=step_of(trainer, pl_module))
    else:
        pl_module.log_dict(metrics, batch_size=1, reduce_fx="max", sync_dist=True)
