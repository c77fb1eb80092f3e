"""Prompts from files and from the hub."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from moa_lightning.data.base import PromptData, Row, Stage
from moa_lightning.errors import UserError
from moa_lightning.utils.import_path import import_dotted
from moa_lightning.utils.load_rows import load_rows, require_columns

_RESERVED = ("prompts", "completions")  # arguments of every reward function


class Prompts(PromptData):
    """Prompts from a JSONL, JSON, CSV or Parquet file, or from a hub data set.

    A prompt is text, or a list of chat messages ``{"role": …, "content": …}``. The other columns are passed to the
    rewards. Without their own files, validation uses rows held out of ``path``, and testing uses the validation rows.

    Args:
        path: file, or hub id.
        val_path: file or hub id of the validation rows; ``None`` uses split ``val_split`` of ``path`` if that is set,
            or holds out ``val_size`` rows.
        test_path: file or hub id for ``moa test`` and ``moa predict``; ``None`` uses split ``test_split`` of ``path``
            if that is set, or the validation rows.
        split: split for training, of a hub data set; ``None`` is ``train``.
        val_split: split for validation, of a hub data set.
        test_split: split for tests, of a hub data set.
        subset: configuration of a hub data set.
        prompt_column: name of the column that holds the prompt.
        prompt_function: dotted path of ``f(row: dict) -> str | list of messages``, which builds the prompt from a row
            instead of ``prompt_column``; for HH-RLHF ``moa_lightning.data.dialogues.hh_prompt``.
        val_size: rows to hold out for validation.
        split_seed: decides which rows are held out. ``seed`` does not, so runs with different seeds share them.
        limit: use only the first rows for training; ``None`` uses all.
        val_limit: the same for validation and testing.
        batch_size: prompts per collected batch, on each process.
        val_batch_size: prompts per evaluation batch; ``None`` is ``batch_size``.
        seed: of the order of training prompts and of the responses that are sampled for them; ``None`` is the run's
            (``seed_everything``).
    """

    def __init__(
        self,
        path: str,
        val_path: str | None = None,
        test_path: str | None = None,
        split: str | None = None,
        val_split: str | None = None,
        test_split: str | None = None,
        subset: str | None = None,
        prompt_column: str = "prompt",
        prompt_function: str | None = None,
        val_size: int = 64,
        split_seed: int = 0,
        limit: int | None = None,
        val_limit: int | None = None,
        batch_size: int = 64,
        val_batch_size: int | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(batch_size, val_batch_size, seed)
        for name, value in {"limit": limit, "val_limit": val_limit}.items():
            if value is not None and value < 1:
                raise UserError(f"data.{name} must be at least 1 or null, got {value}")
        if val_size < 0:
            raise UserError(f"data.val_size must be at least 0, got {val_size}")
        self.path, self.val_path, self.test_path = path, val_path, test_path
        self.split, self.val_split, self.test_split, self.subset = split, val_split, test_split, subset
        self.prompt_column, self.prompt_function = prompt_column, prompt_function
        self.val_size, self.split_seed = val_size, split_seed
        self.limit, self.val_limit = limit, val_limit
        self._rows: dict[Stage, list[Row]] = {}

    def prepare(self) -> None:
        """Read all rows on one process first, so that the others find them in the cache."""
        self._load()

    def rows(self, stage: Stage) -> Sequence[Row]:
        """The rows of a stage, in the order of the file."""
        if not self._rows:
            self._rows = self._load()
        return self._rows[stage]

    def _load(self) -> dict[Stage, list[Row]]:
        """Read the rows of all stages, which have the columns of the training rows."""
        train, validation = self._read(self.path, self.split), []
        if self.val_path is not None or self.val_split is not None:
            validation = self._read(self.val_path or self.path, self.val_split)
        elif self.val_size:
            train, validation = self._hold_out(train)
        test = validation
        if self.test_path is not None or self.test_split is not None:
            test = self._read(self.test_path or self.path, self.test_split)
        for name, others in {"validation": validation, "test": test}.items():
            missing = sorted(set(train[0]) - set(others[0])) if others else []
            if missing:
                raise UserError(
                    f"the {name} rows have no column '{missing[0]}', which the training rows have; add or remove it"
                )
        test = test[: self.val_limit]
        return {
            Stage.TRAIN: train[: self.limit],
            Stage.VALIDATE: validation[: self.val_limit],
            Stage.TEST: test,
            Stage.PREDICT: test,
        }

    def _hold_out(self, rows: list[Row]) -> tuple[list[Row], list[Row]]:
        if self.val_size >= len(rows):
            raise UserError(
                f"data.val_size {self.val_size} leaves no training rows of the {len(rows)} in '{self.path}'; lower it, "
                "or give data.val_path"
            )
        generator = torch.Generator().manual_seed(self.split_seed)
        held_out = set(torch.randperm(len(rows), generator=generator)[: self.val_size].tolist())
        return (
            [row for i, row in enumerate(rows) if i not in held_out],
            [row for i, row in enumerate(rows) if i in held_out],
        )

    def _read(self, path: str, split: str | None) -> list[Row]:
        is_file = Path(path).expanduser().is_file()
        found = load_rows(path, split, None if is_file else self.subset)
        for name in _RESERVED:
            if name in found.column_names:
                raise UserError(f"'{path}' has a column '{name}', which reward functions get otherwise; rename it")
        make = self._prompt_maker(found, path)
        return [{**row, "prompt": make(row, f"'{path}' row {i}")} for i, row in enumerate(found, start=1)]

    def _prompt_maker(self, found: Any, path: str) -> Callable[[Row, str], Any]:
        if self.prompt_function is None:
            require_columns(found, [self.prompt_column], path)
            return lambda row, where: _checked(row[self.prompt_column], where)
        function = import_dotted(self.prompt_function)
        if not callable(function):
            kind = type(function).__name__
            raise UserError(f"data.prompt_function '{self.prompt_function}' is of type {kind}, not a function")

        def call(row: Row, where: str) -> Any:
            try:
                prompt = function(dict(row))
            except Exception as error:
                # The user's function may raise anything.
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                raise UserError(f"{where}: {self.prompt_function} failed: {reason}") from error
            return _checked(prompt, where)

        return call


def _checked(prompt: Any, where: str) -> str | list[dict[str, Any]]:
    """Return a prompt after checking that it is text or a list of chat messages, and not empty."""
    if isinstance(prompt, str):
        if not prompt.strip():
            raise UserError(f"{where}: the prompt is empty; remove the row")
        return prompt
    if not isinstance(prompt, list) or not all(_is_message(message) for message in prompt):
        kind = "null" if prompt is None else type(prompt).__name__
        raise UserError(
            f"{where}: the prompt must be text or a list of messages with 'role' and 'content' as text, got {kind}"
        )
    if not prompt or not any(message["content"].strip() for message in prompt):
        raise UserError(f"{where}: the prompt is empty; remove the row")
    # All rows of a file have the same fields, so a field that a message lacks is null.
    return [{key: value for key, value in message.items() if value is not None} for message in prompt]


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
