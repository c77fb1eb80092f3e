"""Preference data: prompts with candidate responses and preference labels for each objective."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn

from moa_lightning.data.base import PromptData, Row, Stage
from moa_lightning.data.preference_formats import (
    BadRowError,
    Candidates,
    Comparison,
    PreferenceFormat,
    clean_messages,
)
from moa_lightning.errors import UserError
from moa_lightning.functional.preference import mean_wins
from moa_lightning.utils.load_rows import load_rows, place

WINS = "wins/"
"""Prefix of the columns with each candidate's mean win probability, such as ``wins/harmless``."""
SCORES = "scores/"
"""Prefix of the columns with a number for each candidate, such as ``scores/length``."""


@dataclass(frozen=True)
class _Placed:
    """A row with its path and index, for messages."""

    row: Row
    path: str
    index: int  # from 0


class Preferences(PromptData):
    """Rows with a prompt, two or more responses, and preference labels for each named objective.

    Each row becomes ``prompt``, ``responses`` and, for each objective, a column ``wins/<objective>`` with each
    response's mean probability to win against the others; NaN where there is no label. Formats with numbers add
    ``scores/<name>``.

    Args:
        path: JSONL, JSON, CSV or Parquet file (``.gz`` too), or hub id.
        format: layout of the rows: ``Candidates``, ``ChosenRejected``, ``SafeRLHF``, ``Ratings``.
        val_path: file or hub id of the validation rows; ``None`` holds out ``val_size`` rows of ``path``.
        split: split for training, of a hub data set; ``None`` is ``train``.
        val_size: rows to hold out for validation.
        split_seed: decides which rows are held out.
        on_bad_row: ``fail`` stops at the first row that cannot be used; ``skip`` leaves such rows out and warns with
            their number. If some rows have labels, a row without labels cannot be used.
        limit: use the first rows only; ``None`` is all of them.
        batch_size: prompts per batch, on each process.
        val_batch_size: prompts per evaluation batch; ``None`` is ``batch_size``.
        seed: of the order of training rows; ``None`` is the run's (``seed_everything``).
    """

    def __init__(
        self,
        path: str,
        format: PreferenceFormat | None = None,  # noqa: A002  (the name that users type)
        val_path: str | None = None,
        split: str | None = None,
        val_size: int = 64,
        split_seed: int = 0,
        on_bad_row: Literal["fail", "skip"] = "fail",
        limit: int | None = None,
        batch_size: int = 16,
        val_batch_size: int | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(batch_size, val_batch_size, seed)
        if val_size < 0 or (limit is not None and limit < 1):
            raise UserError("data.val_size must be at least 0, and data.limit at least 1 or null")
        self.path, self.val_path, self.split = path, val_path, split
        self.format = format or Candidates()
        self.val_size, self.split_seed = val_size, split_seed
        self.on_bad_row, self.limit = on_bad_row, limit
        self._read_rows: dict[Stage, list[_Placed]] = {}

    def prepare(self) -> None:
        """Read all rows on one process first, so that the others find them in the cache."""
        self.rows(Stage.TRAIN)

    def rows(self, stage: Stage) -> Sequence[Row]:
        """The rows of a stage; testing and prediction use the validation rows."""
        return [placed.row for placed in self._placed(stage)]

    def _placed(self, stage: Stage) -> list["_Placed"]:
        if not self._read_rows:
            train = self._read(self.path)[: self.limit]
            if self.val_path is not None:
                held_out = self._read(self.val_path)
            else:
                train, held_out = self._hold_out(train)
            _same_columns([placed.row for placed in [*train, *held_out]])
            others = dict.fromkeys((Stage.VALIDATE, Stage.TEST, Stage.PREDICT), held_out)
            self._read_rows = {Stage.TRAIN: train, **others}
        return self._read_rows[stage]

    def screen(self, trainer_stage: str, problem: Callable[[Row], str | None]) -> None:
        """Refuse or skip rows that the policy cannot read, depending on ``on_bad_row``."""
        for name in self.rows_to_check(trainer_stage):
            placed = self._placed(Stage(name))
            kept, first = [], ""
            for one in placed:
                reason = problem(one.row)
                if reason is None:
                    kept.append(one)
                else:
                    first = first or self._bad_row(one.path, one.index, reason)
            self._report(len(placed) - len(kept), len(placed), f"{name} rows", first)
            self._read_rows[Stage(name)] = kept

    def _read(self, path: str) -> list["_Placed"]:
        found = load_rows(path, self.split)
        placed: list[_Placed] = []
        first = ""
        for index, row in enumerate(found):
            try:
                placed.append(_Placed(to_row(self.format.read(row)), path, index))
            except BadRowError as error:
                first = first or self._bad_row(path, index, str(error))
        labelled = [one for one in placed if _has_label(one.row)]
        if labelled and len(labelled) < len(placed):  # if no row has labels, rewards score all objectives
            index = next(one.index for one in placed if not _has_label(one.row))
            first = first or self._bad_row(path, index, "no objective has a label")
            placed = labelled
        self._report(len(found) - len(placed), len(found), f"rows of '{path}'", first)
        return placed

    def _bad_row(self, path: str, index: int, reason: str) -> str:
        """Describe a bad row, or raise an error if such rows are not skipped."""
        line = f"{place(path, index)}: {reason}"
        if self.on_bad_row == "fail":
            raise UserError(f"{line}; or set --data.on_bad_row=skip")
        return line

    def _report(self, bad: int, total: int, what: str, first: str) -> None:
        if bad and bad == total:
            raise UserError(f"none of the {total} {what} can be used; the first: {first}")
        if bad:
            rank_zero_warn(f"{bad} of {total} {what} cannot be used and are left out; the first: {first}")

    def _hold_out(self, rows: list["_Placed"]) -> tuple[list["_Placed"], list["_Placed"]]:
        if self.val_size >= len(rows):
            raise UserError(
                f"data.val_size {self.val_size} leaves nothing to train on: '{self.path}' has {len(rows)} rows; lower "
                "it"
            )
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(self.split_seed)).tolist()
        chosen = set(order[: self.val_size])
        return (
            [row for i, row in enumerate(rows) if i not in chosen],
            [row for i, row in enumerate(rows) if i in chosen],
        )


def to_row(comparison: Comparison) -> Row:
    """Convert a comparison to the columns that sources read.

    Raises:
        BadRowError: an empty prompt or response, fewer than two responses, or two identical ones.
    """
    checked = _checked(comparison)
    unknown = [float("nan")] * len(checked.responses)
    wins = {
        WINS + name: unknown if matrix is None else mean_wins(torch.tensor(matrix)).tolist()
        for name, matrix in checked.wins.items()
    }
    scores = {SCORES + name: values for name, values in checked.scores.items()}
    return {"prompt": checked.prompt, "responses": checked.responses, **wins, **scores}


def _checked(comparison: Comparison) -> Comparison:
    prompt: Any = comparison.prompt
    responses: list[Any] = list(comparison.responses)
    if isinstance(prompt, list):
        prompt = clean_messages(prompt, "prompt")
    if not (prompt if isinstance(prompt, str) else "".join(message["content"] for message in prompt)).strip():
        raise BadRowError("'prompt' is empty")
    if len(responses) < 2:
        raise BadRowError(f"a comparison takes two or more responses, got {len(responses)}")
    fields = comparison.fields or tuple(f"responses[{i}]" for i in range(len(responses)))
    for i, (response, name) in enumerate(zip(responses, fields, strict=True)):
        if response is None:
            raise BadRowError(f"'{name}' is missing")
        if not isinstance(response, str):
            raise BadRowError(f"'{name}' must be text, got {response!r:.40}")
        if not response.strip():
            raise BadRowError(f"'{name}' is empty")
        if response in responses[:i]:
            raise BadRowError(f"'{fields[responses.index(response)]}' and '{name}' are identical")
    return replace(comparison, prompt=prompt)


def _has_label(row: Row) -> bool:
    return any(math.isfinite(p) for name, wins in row.items() if name.startswith(WINS) for p in wins)


def _same_columns(rows: list[Row]) -> None:
    """Add every objective's column to every row, with NaN where a row lacks it. In place."""
    names = list(dict.fromkeys(name for row in rows for name in row if name.startswith((WINS, SCORES))))
    for row in rows:
        for name in names:
            row.setdefault(name, [float("nan")] * len(row["responses"]))
