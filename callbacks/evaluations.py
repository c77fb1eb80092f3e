"""What all callbacks that look at evaluations share.

Legend: B responses, N objectives (eval-only ones included).
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from moa_lightning.distributed import all_sum
from moa_lightning.types import Evaluation


@dataclass(frozen=True)
class Statistics:
    """One objective over one evaluation, over all processes, responses without a score left out.

    ``mean``, ``std`` and ``std_error`` are of its values: after scale, shift and clip, the unit of training and of
    thresholds.
    """

    mean: float
    std: float  # of the responses
    std_error: float  # of the mean; NaN with fewer than two responses
    count: int
    raw_mean: float  # of the scores as the reward gave them
    raw_std_error: float
    transform: str = ""  # how values follow from raw scores, in words; empty where they are the same


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
            self.on_evaluation(trainer, pl_module, statistics_of(self._batches), self._batches)
        self._batches = []


def step_of(trainer: Trainer, pl_module: LightningModule) -> int:
    """Updates of the weights: of the run, or of the checkpoint that is evaluated alone."""
    return int(getattr(pl_module, "steps_done", trainer.global_step))


def statistics_of(batches: list[Evaluation]) -> dict[str, Statistics]:
    """Statistics of each objective, by name."""
    table = batches[0].rewards
    both_B2N = torch.cat([torch.cat([b.rewards.value_BN, b.rewards.raw_BN], dim=1) for b in batches]).double()
    count_2N, mean_2N, std_2N = moments(both_B2N)
    error_2N = (std_2N / count_2N.sqrt()).where(count_2N > 1, torch.nan)
    count, mean, std, error = (moment_2N.tolist() for moment_2N in (count_2N, mean_2N, std_2N, error_2N))
    number = len(table.names)
    return {
        name: Statistics(
            mean[i],
            std[i],
            error[i],
            int(count[i]),
            mean[number + i],
            error[number + i],
            table.transform_by_name.get(name, ""),
        )
        for i, name in enumerate(table.names)
    }


def moments(scores_BN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and standard deviation of each column over all processes; NaN entries are left out."""
    present_BN = torch.isfinite(scores_BN)
    kept_BN = scores_BN.where(present_BN, 0.0)
    count_N = all_sum(present_BN.sum(0).to(scores_BN.dtype))
    mean_N = all_sum(kept_BN.sum(0)) / count_N
    squares_N = all_sum((kept_BN - mean_N).where(present_BN, 0.0).square().sum(0))
    return count_N, mean_N, (squares_N / (count_N - 1).clamp(min=1)).sqrt()


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
