"""Prompts from files and from the hub."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from moa_lightning.data.base import PromptData, Row, Stage
from moa_lightning.data.files import load_rows, require_column
from moa_lightning.dotted import import_dotted


class Prompts(PromptData):
    """Prompts from a JSONL, JSON, CSV or Parquet file (``.gz`` too), or from a data set on the hub.

    The other columns go to the rewards. Validation prompts are held out of ``path`` unless a file or split of their
    own is given; ``test`` and ``predict`` use ``test_path``, or the validation prompts without one.

    Args:
        path: file or hub id.
        val_path: file or hub id of the validation prompts; ``None`` holds ``val_size`` rows out.
        test_path: file or hub id for ``moa test`` and ``moa predict``; ``None`` takes the validation prompts.
        prompt_column: text, or a list of chat messages.
        prompt_function: dotted path to ``f(row) -> text or messages``, which makes the prompt from a row instead,
            such as ``moa_lightning.data.dialogues.hh_prompt``.
        split: of a data set on the hub.
        val_split: of ``val_path`` on the hub.
        test_split: of ``test_path`` on the hub.
        val_size: rows held out where there is no ``val_path``.
        limit: use the first rows of ``path`` only.
        val_limit: use the first validation rows only.
        batch_size: prompts per collected batch, on each process.
        val_batch_size: prompts per evaluation batch; ``None`` is ``batch_size``.
        seed: of the held-out rows and of the order in which training prompts are drawn.
    """

    def __init__(
        self,
        path: str,
        val_path: str | None = None,
        test_path: str | None = None,
        prompt_column: str = "prompt",
        prompt_function: str | None = None,
        split: str = "train",
        val_split: str = "validation",
        test_split: str = "test",
        val_size: int = 64,
        limit: int | None = None,
        val_limit: int | None = None,
        batch_size: int = 64,
        val_batch_size: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, val_batch_size, seed)
        if val_size < 1:
            raise ValueError(f"data.val_size must be at least 1, got {val_size}")
        self.path, self.val_path, self.test_path = path, val_path, test_path
        self.prompt_column, self.prompt_function = prompt_column, prompt_function
        self.split, self.val_split, self.test_split = split, val_split, test_split
        self.val_size, self.limit, self.val_limit = val_size, limit, val_limit
        self._rows: dict[Stage, Sequence[Row]] = {}

    def rows(self, stage: Stage) -> Sequence[Row]:
        """The rows of a stage."""
        if not self._rows:
            self._rows = self._load()
        return self._rows[stage]

    def _load(self) -> dict[Stage, Sequence[Row]]:
        train = self._read(self.path, self.split, self.limit)
        if self.val_path is None:
            if len(train) <= self.val_size:
                raise ValueError(
                    f"'{self.path}' has {len(train)} rows, no more than the {self.val_size} to hold out; lower "
                    "data.val_size, or set data.val_path"
                )
            order = torch.randperm(len(train), generator=torch.Generator().manual_seed(self.seed)).tolist()
            held_out = set(order[: self.val_size])
            validate = [row for i, row in enumerate(train) if i in held_out][: self.val_limit]
            train = [row for i, row in enumerate(train) if i not in held_out]
        else:
            validate = self._read(self.val_path, self.val_split, self.val_limit)
        test = validate if self.test_path is None else self._read(self.test_path, self.test_split, None)
        if self.val_path is not None or self.test_path is not None:
            self._require_same_columns(train, validate, test)
        return {Stage.TRAIN: train, Stage.VALIDATE: validate, Stage.TEST: test, Stage.PREDICT: test}

    def _read(self, path: str, split: str, limit: int | None) -> list[Row]:
        rows = load_rows(path, split, limit)
        if self.prompt_function is None:
            require_column(rows, self.prompt_column, path)
        make = self._maker()
        result = []
        for number, row in enumerate(rows, start=1):
            try:
                result.append(self._row(row, make))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"'{path}', row {number}: {error}") from error
        return result

    def _maker(self) -> Callable[[dict[str, Any]], Any]:
        if self.prompt_function is None:
            return lambda row: row[self.prompt_column]
        maker: Callable[[dict[str, Any]], Any] = import_dotted(self.prompt_function)
        return maker

    def _row(self, row: dict[str, Any], make: Callable[[dict[str, Any]], Any]) -> Row:
        prompt = make(row)
        if not _is_prompt(prompt):
            raise ValueError(
                "the prompt must be text or a list of messages with 'role' and 'content', and not empty; got "
                f"{str(prompt)[:60]!r}"
            )
        used = self.prompt_column if self.prompt_function is None else "prompt"
        return {**{name: value for name, value in row.items() if name != used}, "prompt": prompt}

    def _require_same_columns(self, *parts: Sequence[Row]) -> None:
        first, *others = (set(part[0]) for part in parts)
        for other in others:
            if not first <= other:
                raise ValueError(
                    f"validation or test rows lack the columns {', '.join(sorted(first - other))} of the training rows"
                )


def _is_prompt(prompt: Any) -> bool:
    if isinstance(prompt, list):
        return bool(prompt) and all(isinstance(m, dict) and {"role", "content"} <= set(m) for m in prompt)
    return isinstance(prompt, str) and bool(prompt.strip())
