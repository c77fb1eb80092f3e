"""The comparisons of a file, checked at once and read again as they are needed."""

from dataclasses import dataclass
from typing import Any, Literal

from moa_lightning import chat
from moa_lightning.data.base import Row
from moa_lightning.data.preference_formats import BadRowError, Candidates, Comparison, PreferenceFormat, Prompt
from moa_lightning.data.preferences import to_row
from moa_lightning.errors import UserError
from moa_lightning.utils.load_rows import load_rows, place
from moa_lightning.utils.pretrained import open_tokenizer

_NOT_PASSED = frozenset({"prompt", "responses", "prompts", "completions", "self"})  # rewards get these otherwise


@dataclass(frozen=True)
class Comparisons:
    """Prompts with two or more responses each.

    Args:
        path: JSONL, JSON, CSV or Parquet file (``.gz`` too), or hub id.
        format: how the rows are laid out: ``Candidates`` (whose ``preferences`` may be left out), ``ChosenRejected``,
            ``SafeRLHF``, ``Ratings``; ``None`` is ``Candidates``.
        split: of a data set on the hub.
        on_bad_row: ``fail`` stops at the first row that cannot be used; ``skip`` leaves them out and says how many.
        limit: use the first rows only; ``None`` uses all.
    """

    path: str
    format: PreferenceFormat | None = None
    split: str | None = None
    on_bad_row: Literal["fail", "skip"] = "fail"
    limit: int | None = None

    def __post_init__(self) -> None:
        """Validate hyperparameters."""
        if self.limit is not None and self.limit < 1:
            raise UserError(f"data.limit must be at least 1 or null, got {self.limit}")


class Renderer:
    """Prompts as rewards read them: text as it is, chat messages through a tokenizer's template.

    Args:
        tokenizer: folder or hub id of the tokenizer; ``None`` refuses chat messages.

    Raises:
        UserError: it does not open, or has no template.
    """

    def __init__(self, tokenizer: str | None) -> None:
        self._tokenizer = None if tokenizer is None else open_tokenizer(tokenizer)
        if self._tokenizer is not None and not self._tokenizer.chat_template:
            raise UserError(f"tokenizer '{tokenizer}' has no chat template; give that of a chat model, or none")

    def __call__(self, prompt: Prompt) -> str:
        """The prompt as text.

        Raises:
            BadRowError: the template refuses the messages.
            UserError: chat messages, but no tokenizer.
        """
        if isinstance(prompt, str):
            return prompt
        if self._tokenizer is None:
            raise UserError(
                "the prompt is chat messages; set --tokenizer to the folder or hub id of the policy, whose chat "
                "template makes text of them"
            )
        try:
            return chat.render(self._tokenizer, prompt)
        except chat.TemplateError as error:
            raise BadRowError(str(error)) from error


class ComparisonTable:
    """The rows of a file that can be used, read again at each access, so that none stays in memory.

    Args:
        data: where they are.
        render: makes text of prompts.

    Raises:
        UserError: the file does not load, a row cannot be used and ``on_bad_row`` is ``fail``, or none can.
    """

    def __init__(self, data: Comparisons, render: Renderer) -> None:
        rows = load_rows(data.path, data.split)
        self._rows = rows if data.limit is None else rows.select(range(min(data.limit, len(rows))))
        self._format, self.render = data.format or Candidates(), render
        self._kept: list[int] = []
        self.first_bad = ""
        for i, row in enumerate(self._rows):
            try:
                render(self._read(row).prompt)
                self._kept.append(i)
            except BadRowError as error:
                self.first_bad = self.first_bad or f"{place(data.path, i)}: {error}"
                if data.on_bad_row == "fail":
                    raise UserError(f"{self.first_bad}; or set --data.on_bad_row=skip") from error
            except UserError as error:
                raise UserError(f"{place(data.path, i)}: {error}") from error
        if not self._kept:
            raise UserError(
                f"none of the {len(self._rows)} rows of '{data.path}' can be used; the first: {self.first_bad}"
            )

    def __len__(self) -> int:
        """Rows that can be used."""
        return len(self._kept)

    @property
    def left_out(self) -> int:
        """Rows that cannot."""
        return len(self._rows) - len(self._kept)

    @property
    def columns(self) -> set[str]:
        """Names of the columns that rewards get."""
        return set(self._rows.column_names) - _NOT_PASSED

    def comparison(self, index: int) -> Comparison:
        """What a row compares, as training on it reads it."""
        return self._read(self._rows[self._kept[index]])

    def others(self, index: int) -> dict[str, Any]:
        """A row's other columns."""
        row: Row = self._rows[self._kept[index]]
        return {name: row[name] for name in self.columns}

    def _read(self, row: Row) -> Comparison:
        found = self._format.read(row)
        checked = to_row(found)
        return Comparison(checked["prompt"], checked["responses"], found.wins)
