"""Writes what ``moa predict`` produces."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from moa_lightning.callbacks.samples import lines_of
from moa_lightning.callbacks.writing import reason
from moa_lightning.distributed import rank, world_size
from moa_lightning.errors import UserError
from moa_lightning.types import Evaluation


class PredictionWriter(Callback):
    """Writes responses with their N scores as JSONL, one line each, as they come.

    A line holds ``prompt``, ``completion``, ``scores`` (by objective, in the reward's own units; null where it had
    no opinion), ``values`` (of the objectives that scale, shift or clip them), ``length`` in tokens, ``truncated``,
    and the data's other columns under ``columns``.

    Args:
        path: the file; ``None`` is ``predictions.jsonl`` in the run folder. With several processes each writes its
            own, ``predictions.0.jsonl`` and so on.
    """

    def __init__(self, path: str | None = None) -> None:
        self.path = path

    def file(self, trainer: Trainer) -> Path:
        """Where this process writes."""
        return self.files(trainer)[rank()]

    def files(self, trainer: Trainer) -> list[Path]:
        """Where each process writes."""
        path = Path(self.path) if self.path else Path(trainer.default_root_dir) / "predictions.jsonl"
        if world_size() == 1:
            return [path]
        return [path.with_suffix(f".{number}{path.suffix}") for number in range(world_size())]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a file that is there, before any model is loaded.

        Raises:
            UserError: it exists already.
        """
        if stage == "predict" and (file := self.file(trainer)).exists():
            raise UserError(f"{file} exists already; remove it, or set --predictions.path to another file")

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the file."""
        file = self.file(trainer)
        with _writable(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch(exist_ok=False)  # another process may have begun meanwhile

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Append the batch."""
        assert isinstance(outputs, Evaluation)
        path = self.file(trainer)
        with _writable(path), path.open("a", encoding="utf-8") as file:
            for i, line in enumerate(lines_of(outputs)):
                line["columns"] = {name: values[i] for name, values in outputs.responses.columns.items()}
                file.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")


@contextmanager
def _writable(path: Path) -> Iterator[None]:
    """Context manager: predictions that cannot be written end the command in one line."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"'{path}' cannot be written: {reason(error)}; set --predictions.path to another file"
        ) from error
