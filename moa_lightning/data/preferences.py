"""Preference data: prompts with candidate responses and who wins under each objective."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn

from moa_lightning.data.base import PromptData, Row, Stage
from moa_lightning.data.preference_formats import BadRowError, Candidates, Comparison, PreferenceFormat
from moa_lightning.functional.preference import mean_wins
from moa_lightning.rows import load_rows

WINS = "wins/"
"""Prefix of the columns with each candidate's mean win probability, such as ``wins/harmless``."""


class Preferences(PromptData):
    """Rows with a prompt, two or more responses and, for each named objective, who wins.

    Each row becomes ``prompt``, ``responses`` and one column ``wins/<objective>`` with each response's mean probability
    to win against the others, NaN where nobody was asked.

    Args:
        path: JSONL, JSON, CSV or Parquet file (``.gz`` too), or hub id.
        format: how the rows are laid out: ``Candidates``, ``ChosenRejected``, ``SafeRLHF``, ``Ratings``.
        val_path: file or hub id of the validation rows; ``None`` holds out ``val_size`` rows of ``path``.
        split: split for training, of a hub data set; ``None`` is ``train``.
        val_size: rows to hold out for validation.
        split_seed: decides which rows are held out.
        on_bad_row: ``fail`` stops at the first row that cannot be used; ``skip`` leaves them out and says how many.
        limit: use the first rows only; ``None`` is all of them.
        batch_size: prompts per batch, on each process.
        val_batch_size: prompts per evaluation batch; ``None`` is ``batch_size``.
        seed: of the order of training rows.
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
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, val_batch_size, seed)
        if val_size < 0 or (limit is not None and limit < 1):
            raise ValueError("data.val_size must be at least 0, and data.limit at least 1 or null")
        self.path, self.val_path, self.split = path, val_path, split
        self.format = format or Candidates()
        self.val_size, self.split_seed = val_size, split_seed
        self.on_bad_row, self.limit = on_bad_row, limit
        self._rows: dict[Stage, list[Row]] = {}

    def prepare_data(self) -> None:
        """Read everything once on one process, so that the others find it in the cache."""
        self.rows(Stage.TRAIN)

    def rows(self, stage: Stage) -> Sequence[Row]:
        """The rows of a stage; tests and predictions take those of validation."""
        if not self._rows:
            train = self._read(self.path)[: self.limit]
            if self.val_path is not None:
                held_out = self._read(self.val_path)
            else:
                train, held_out = self._hold_out(train)
            _same_columns([*train, *held_out])
            self._rows = {Stage.TRAIN: train, **dict.fromkeys((Stage.VALIDATE, Stage.TEST, Stage.PREDICT), held_out)}
        return self._rows[stage]

    def screen(self, trainer_stage: str, problem: Callable[[Row], str | None]) -> None:
        """Refuse or leave out rows that the policy cannot read, as ``on_bad_row`` says."""
        for name, rows in self.rows_to_check(trainer_stage).items():
            kept = []
            for number, row in enumerate(rows, start=1):
                reason = problem(row)
                if reason is None:
                    kept.append(row)
                elif self.on_bad_row == "fail":
                    raise ValueError(f"{name} row {number}: {reason}, or set --data.on_bad_row=skip")
            self._report(len(rows) - len(kept), len(rows), f"the {name} rows")
            self._rows[Stage(name)] = kept

    def _read(self, path: str) -> list[Row]:
        found = load_rows(path, self.split)
        rows, bad = [], 0
        for number, row in enumerate(found, start=1):
            try:
                rows.append(to_row(self.format.read(row)))
            except BadRowError as error:
                if self.on_bad_row == "fail":
                    raise ValueError(f"'{path}' row {number}: {error}; or set --data.on_bad_row=skip") from error
                bad += 1
        self._report(bad, len(found), f"'{path}'")
        return rows

    def _report(self, bad: int, total: int, what: str) -> None:
        if bad == total and total:
            raise ValueError(f"no row of {what} can be used with data.format {type(self.format).__name__}")
        if bad:
            rank_zero_warn(f"{bad} of {total} rows of {what} cannot be used and are left out")

    def _hold_out(self, rows: list[Row]) -> tuple[list[Row], list[Row]]:
        if self.val_size >= len(rows):
            raise ValueError(
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
    """A comparison as the sources read it.

    Raises:
        BadRowError: an empty prompt or response, fewer than two responses, or two that are the same.
    """
    checked = _checked(comparison)
    unknown = [float("nan")] * len(checked.responses)
    wins = {
        WINS + name: unknown if matrix is None else mean_wins(torch.tensor(matrix)).tolist()
        for name, matrix in checked.wins.items()
    }
    return {"prompt": checked.prompt, "responses": checked.responses, **wins}


def _checked(comparison: Comparison) -> Comparison:
    prompt: Any = comparison.prompt
    responses: list[Any] = list(comparison.responses)
    if isinstance(prompt, list):
        if not prompt or not all(isinstance(m, dict) and isinstance(m.get("content"), str) for m in prompt):
            raise BadRowError("'prompt' must be text or a list of messages with 'role' and 'content'")
        prompt = [{key: value for key, value in message.items() if value is not None} for message in prompt]
    if isinstance(prompt, str) and not prompt.strip():
        raise BadRowError("'prompt' is empty")
    if len(responses) < 2:
        raise BadRowError(f"a comparison takes two or more responses, got {len(responses)}")
    for i, response in enumerate(responses):
        if not isinstance(response, str) or not response.strip():
            raise BadRowError(f"response {i} is empty")
        if response in responses[:i]:
            raise BadRowError(f"responses {responses.index(response)} and {i} are identical")
    return replace(comparison, prompt=prompt)


def _same_columns(rows: list[Row]) -> None:
    """Give every row every objective's column: what one row lacks is unknown there."""
    names = list(dict.fromkeys(name for row in rows for name in row if name.startswith(WINS)))
    for row in rows:
        for name in names:
            row.setdefault(name, [float("nan")] * len(row["responses"]))
