"""Prompts as a LightningDataModule; the LightningModule turns them into batches."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from enum import StrEnum
from typing import Any, ClassVar, Protocol, cast

from lightning.pytorch import LightningDataModule
from typing_extensions import override

from moa_lightning.distributed import is_distributed
from moa_lightning.errors import UserError
from moa_lightning.utils.random_state import run_seed


class Stage(StrEnum):
    """The stage that rows are for."""

    TRAIN = "train"
    VALIDATE = "validate"
    TEST = "test"
    PREDICT = "predict"


Row = dict[str, Any]
"""One row: ``prompt`` (text, or a list of chat messages) and any other columns."""


class _Module(Protocol):
    """The LightningModule's methods that the data use."""

    def experience_loader(self, rows: Sequence[Row], batch_size: int, seed: int) -> Iterable[Any]: ...

    def prompt_loader(self, rows: Sequence[Row], batch_size: int) -> Iterable[Any]: ...


class PromptData(LightningDataModule, ABC):
    """Rows with a ``prompt``, for each stage.

    Args:
        batch_size: prompts per collected batch, on each process.
        val_batch_size: prompts per evaluation batch; ``None`` is ``batch_size``.
        seed: of the order of training prompts and of the responses that are sampled for them; ``None`` is the run's
            (``seed_everything``).
    """

    one_thread: ClassVar[bool] = False  # whether the task's model is so small that more threads slow it down

    def __init__(self, batch_size: int = 64, val_batch_size: int | None = None, seed: int | None = None) -> None:
        super().__init__()
        if batch_size < 1 or (val_batch_size is not None and val_batch_size < 1):
            raise UserError(f"data.batch_size must be at least 1, got {batch_size} (val_batch_size {val_batch_size})")
        self.batch_size = batch_size
        self.val_batch_size = val_batch_size or batch_size
        self.seed = seed
        self._unprepared: Exception | None = None

    def prepare_data(self) -> None:
        """Call :meth:`prepare`. With several processes, an error is raised in ``setup``: here the others would hang."""
        try:
            self.prepare()
        except Exception as error:
            if not is_distributed():
                raise
            self._unprepared = error

    def prepare(self) -> None:
        """Read, download or build data on one process of each node, before the others continue."""

    @abstractmethod
    def rows(self, stage: Stage) -> Sequence[Row]:
        """The rows of a stage. All have the same columns."""

    @property
    def columns(self) -> set[str]:
        """Names of the columns besides ``prompt``."""
        if self._unprepared is not None:
            raise self._unprepared
        rows = self.rows(Stage.TRAIN)
        return set(rows[0]) - {"prompt"} if len(rows) else set()

    def rows_to_check(self, trainer_stage: str) -> dict[str, Sequence[Row]]:
        """Rows that a stage of the Trainer (``fit``, ``validate``, …) uses, by their name in messages."""
        stages = [Stage.TRAIN, Stage.VALIDATE] if trainer_stage == "fit" else [Stage(trainer_stage)]
        return {stage.value: self.rows(stage) for stage in stages}

    def screen(self, trainer_stage: str, problem: Callable[[Row], str | None]) -> None:
        """Refuse rows that the policy cannot read.

        Args:
            trainer_stage: the Trainer's.
            problem: returns why a row cannot be read, or ``None``.

        Raises:
            UserError: one line with the first such row, counted from 1.
        """
        for name, rows in self.rows_to_check(trainer_stage).items():
            for number, row in enumerate(rows, start=1):
                reason = problem(row)
                if reason is not None:
                    raise UserError(f"{name} row {number}: {reason}")

    def train_dataloader(self) -> Iterable[Any]:
        """Minibatches of experience, which the module collects on the training prompts."""
        return self._module().experience_loader(self.rows(Stage.TRAIN), self.batch_size, run_seed(self.seed))

    @override
    def val_dataloader(self) -> Iterable[Any]:
        return self._prompts(Stage.VALIDATE)

    @override
    def test_dataloader(self) -> Iterable[Any]:
        return self._prompts(Stage.TEST)

    @override
    def predict_dataloader(self) -> Iterable[Any]:
        return self._prompts(Stage.PREDICT)

    def _prompts(self, stage: Stage) -> Iterable[Any]:
        return self._module().prompt_loader(self.rows(stage), self.val_batch_size)

    def _module(self) -> _Module:
        assert self.trainer is not None
        return cast(_Module, self.trainer.lightning_module)
