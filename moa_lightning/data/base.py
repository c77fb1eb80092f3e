"""Prompts as a LightningDataModule; the module that trains turns them into batches."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from enum import StrEnum
from typing import Any, ClassVar, Protocol, cast

from lightning.pytorch import LightningDataModule

from moa_lightning.distributed import is_distributed
from moa_lightning.errors import UserError
from moa_lightning.utils.random_state import run_seed


class Stage(StrEnum):
    """Which rows are asked for."""

    TRAIN = "train"
    VALIDATE = "validate"
    TEST = "test"
    PREDICT = "predict"


Row = dict[str, Any]
"""One row: ``prompt`` (text, or a list of chat messages) and any other columns."""


class _Module(Protocol):
    """What the data asks of the module that trains."""

    def experience_loader(self, rows: Sequence[Row], batch_size: int, seed: int) -> Iterable[Any]: ...

    def prompt_loader(self, rows: Sequence[Row], batch_size: int) -> Iterable[Any]: ...


class PromptData(LightningDataModule, ABC):
    """Rows with a ``prompt``, for each stage.

    Args:
        batch_size: prompts per collected batch, on each process.
        val_batch_size: prompts per evaluation batch; ``None`` is ``batch_size``.
        seed: of the order in which training prompts are drawn, and of the responses that are sampled for them; ``None``
            is that of the run (``seed_everything``).
    """

    one_thread: ClassVar[bool] = False  # the task's model is so small that threads would only wait for each other

    def __init__(self, batch_size: int = 64, val_batch_size: int | None = None, seed: int | None = None) -> None:
        super().__init__()
        if batch_size < 1 or (val_batch_size is not None and val_batch_size < 1):
            raise UserError(f"data.batch_size must be at least 1, got {batch_size} (val_batch_size {val_batch_size})")
        self.batch_size = batch_size
        self.val_batch_size = val_batch_size or batch_size
        self.seed = seed
        self._unprepared: Exception | None = None

    def prepare_data(self) -> None:
        """Call :meth:`prepare`. With several processes an error waits for ``setup``: the others would wait here."""
        try:
            self.prepare()
        except Exception as error:
            if not is_distributed():
                raise
            self._unprepared = error

    def prepare(self) -> None:
        """What one process of each node does before the others: read, download, build."""

    @abstractmethod
    def rows(self, stage: Stage) -> Sequence[Row]:
        """The rows of a stage; all have the same columns."""

    @property
    def columns(self) -> set[str]:
        """Names of the columns beside ``prompt``."""
        if self._unprepared is not None:
            raise self._unprepared
        rows = self.rows(Stage.TRAIN)
        return set(rows[0]) - {"prompt"} if len(rows) else set()

    def rows_to_check(self, trainer_stage: str) -> dict[str, Sequence[Row]]:
        """Rows that the Trainer's stage (``fit``, ``validate``, …) will use, under a name for messages."""
        stages = [Stage.TRAIN, Stage.VALIDATE] if trainer_stage == "fit" else [Stage(trainer_stage)]
        return {stage.value: self.rows(stage) for stage in stages}

    def screen(self, trainer_stage: str, problem: Callable[[Row], str | None]) -> None:
        """Refuse rows that the policy cannot read.

        Args:
            trainer_stage: the Trainer's.
            problem: what is wrong with a row, or ``None``.

        Raises:
            UserError: names the first such row, counted from 1.
        """
        for name, rows in self.rows_to_check(trainer_stage).items():
            for number, row in enumerate(rows, start=1):
                reason = problem(row)
                if reason is not None:
                    raise UserError(f"{name} row {number}: {reason}")

    def train_dataloader(self) -> Iterable[Any]:
        """Collected experience, minibatch by minibatch."""
        return self._module().experience_loader(self.rows(Stage.TRAIN), self.batch_size, run_seed(self.seed))

    def val_dataloader(self) -> Iterable[Any]:
        """Prompts in order."""
        return self._prompts(Stage.VALIDATE)

    def test_dataloader(self) -> Iterable[Any]:
        """Prompts in order."""
        return self._prompts(Stage.TEST)

    def predict_dataloader(self) -> Iterable[Any]:
        """Prompts in order."""
        return self._prompts(Stage.PREDICT)

    def _prompts(self, stage: Stage) -> Iterable[Any]:
        return self._module().prompt_loader(self.rows(stage), self.val_batch_size)

    def _module(self) -> _Module:
        assert self.trainer is not None
        return cast(_Module, self.trainer.lightning_module)
