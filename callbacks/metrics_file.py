"""``metrics.csv``: every metric of a run, in one file."""

import csv
import os
from argparse import Namespace
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from moa_lightning.callbacks.growing_file import drop_cut_line
from moa_lightning.callbacks.writing import Writing
from moa_lightning.utils.atomic_file import atomic_file
from moa_lightning.utils.lightning_private import is_in_batch, log_training_step


class MetricsFile(Logger):
    """Writes metrics to ``metrics.csv`` in the run folder, one row per step.

    A row's step is the number of updates before it, as Lightning counts: the row of step k holds the evaluation after
    k updates, and the batch that this policy collected with the update that was made on it, the (k+1)th.

    Lightning's own CSV logger wants a folder of its own and empties it; this one appends. Rows of an earlier part of
    the run stay, and a metric that appears later adds a column. A metric that comes twice for one step, as from a
    part of the run that was repeated, makes a second row.

    With :class:`MetricsBeforeCheckpoints` a checkpoint appears after the rows of all steps that it has seen are on the
    disk, so that a run that is killed and resumed has lost none.

    Args:
        folder: the run folder.
    """

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.path = Path(folder) / "metrics.csv"
        self._columns: list[str] = []
        self._row: dict[str, Any] = {}
        self._flushed: dict[str, Any] = {}  # what was written of a step that may not be over
        self._waiting: list[dict[str, Any]] = []  # rows that are not in the file yet
        self._opened = False
        self._writing = Writing()

    @property
    def name(self) -> str:
        """Nothing: the file lies in the run folder itself."""
        return ""

    @property
    def version(self) -> str:
        """Nothing: the run folder is the version."""
        return ""

    @property
    def save_dir(self) -> str:
        """The run folder."""
        return str(self.path.parent)

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Add metrics to the row of a step; the row is written when the next one begins, or at the end."""
        given = {name: value for name, value in metrics.items() if name not in {"step", "epoch"}}
        if all(_equal(self._written_of(step).get(name), value) for name, value in given.items()):
            return
        if self._row and (self._row["step"] != step or given.keys() & self._row.keys()):
            self._append()
        self._row |= {"step": step, **{k: v for k, v in metrics.items() if k != "step"}}

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing: ``config.yaml`` is the record."""

    def save(self) -> None:
        """Nothing: Lightning calls this after each group of metrics, when more may come for the row."""

    @rank_zero_only
    def flush(self) -> None:
        """Write the row of the present step to the disk. What comes of that step afterwards makes another row."""
        if self._row:
            self._flushed = self._written_of(self._row["step"])
        self._append()
        with self._writing.attempt(self.path):
            if self.path.is_file():
                with self.path.open("rb") as file:
                    os.fsync(file.fileno())

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write what is left."""
        self._append()

    def _written_of(self, step: int | None) -> dict[str, Any]:
        """What the file and the row in waiting say of a step."""
        return {k: v for part in (self._flushed, self._row) if part.get("step") == step for k, v in part.items()}

    def _append(self) -> None:
        if self._row:
            self._waiting.append(self._row)
            self._row = {}
        while self._waiting:
            done = False
            with self._writing.attempt(self.path):
                self._write(self._waiting[0])
                done = True
            if not done:  # what of the row is there goes when the file is opened again
                self._opened, self._columns = False, []
                return
            self._waiting.pop(0)

    def _write(self, row: dict[str, Any]) -> None:
        if self._columns and not self.path.is_file():
            rank_zero_warn(f"{self.path} is gone: it was removed or moved during the run; a new one is started")
            self._columns = []
        if not self._opened:
            drop_cut_line(self.path)
            self._opened = True
        if not self._columns and self.path.is_file():
            with self.path.open(newline="", encoding="utf-8") as file:
                self._columns = next(csv.reader(file), [])
        missing = [name for name in row if name not in self._columns]
        if missing:
            self._widen([*self._columns, *missing])
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self._columns).writerow(row)

    def _widen(self, columns: list[str]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        rows: list[dict[str, str]] = []
        if self.path.is_file():
            with self.path.open(newline="", encoding="utf-8") as file:
                rows = list(csv.DictReader(file))
        with atomic_file(self.path) as scratch, scratch.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)
        self._columns = columns


class MetricsBeforeCheckpoints(Callback):
    """Has each :class:`MetricsFile` write its rows before a checkpoint is written.

    Lightning writes a checkpoint of every so many steps before it logs the metrics of its step. A run that is killed
    in between and resumed does not do that step again, so its row would be lost.
    """

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Flush, with the metrics of a step that Lightning has not logged yet."""
        loggers, files = trainer.loggers, [logger for logger in trainer.loggers if isinstance(logger, MetricsFile)]
        batches = trainer.fit_loop.epoch_loop.batch_progress.current
        # In the middle of an update (a checkpoint because its loss is not finite) Lightning still holds the last one's.
        updated = getattr(batches, "processed", 0) == batches.ready
        if trainer.training and updated and is_in_batch(trainer):
            trainer.loggers = list(files)  # the others keep each step once
            log_training_step(trainer)
            trainer.loggers = loggers
        for file in files:
            file.flush()


def _equal(written: Any, given: Any) -> bool:
    return bool(written == given or (written != written and given != given))  # NaN is not equal to itself
