"""``metrics.csv``: every metric of a run, in one file."""

import csv
import os
from argparse import Namespace
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only


class MetricsFile(Logger):
    """Writes metrics to ``metrics.csv`` in the run folder, one row per step.

    Lightning's own CSV logger wants a folder of its own and empties it; this one appends. Rows of an earlier part of
    the run stay, and a metric that appears later adds a column. A metric that comes twice for one step, as from the
    evaluation before the first update and the one after it, makes a second row.

    Args:
        folder: the run folder.
    """

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.path = Path(folder) / "metrics.csv"
        self._columns: list[str] = []
        self._row: dict[str, Any] = {}

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
        repeated = (metrics.keys() & self._row.keys()) - {"step", "epoch"}
        if self._row and (self._row["step"] != step or repeated):
            self._append()
        self._row |= {"step": step, **{k: v for k, v in metrics.items() if k != "step"}}

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing: ``config.yaml`` is the record."""

    def save(self) -> None:
        """Nothing: Lightning calls this after each group of metrics, when more may come for the row."""

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write what is left."""
        self._append()

    def _append(self) -> None:
        if not self._row:
            return
        if not self._columns and self.path.is_file():
            with self.path.open(newline="", encoding="utf-8") as file:
                self._columns = next(csv.reader(file), [])
        missing = [name for name in self._row if name not in self._columns]
        if missing:
            self._widen([*self._columns, *missing])
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self._columns).writerow(self._row)
        self._row = {}

    def _widen(self, columns: list[str]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        rows: list[dict[str, str]] = []
        if self.path.is_file():
            with self.path.open(newline="", encoding="utf-8") as file:
                rows = list(csv.DictReader(file))
        scratch = self.path.with_name(".metrics.csv")
        with scratch.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)
        os.replace(scratch, self.path)
        self._columns = columns
