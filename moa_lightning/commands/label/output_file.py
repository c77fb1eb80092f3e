"""A file of preferences in the layout of :class:`Candidates` that grows row by row, and can be gone on with."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from moa_lightning.data.preference_formats import BadRowError, Candidates, Comparison, Wins
from moa_lightning.errors import UserError

_ELSEWHERE = "choose another --output, or remove that file"


def has_label(wins: Wins | None) -> bool:
    """True if at least two of the candidates were compared."""
    lines = enumerate(wins or [])
    return any(math.isfinite(p) for i, line in lines for j, p in enumerate(line) if i != j)


def to_record(comparison: Comparison) -> dict[str, Any]:
    """A comparison as the object of its line: each label as a whole matrix, null where nobody compared."""
    labels = {name: _matrix(wins) if has_label(wins) else None for name, wins in comparison.wins.items()}
    record = {"prompt": comparison.prompt, "responses": comparison.responses, "preferences": labels}
    scores = {name: [s if math.isfinite(s) else None for s in values] for name, values in comparison.scores.items()}
    return record | ({"scores": scores} if scores else {})


def _matrix(wins: Wins | None) -> dict[str, Any]:
    return {"wins": [[p if math.isfinite(p) else None for p in line] for line in wins or []]}


def _encoded(record: dict[str, Any]) -> bytes:
    return json.dumps(record, ensure_ascii=False).encode()


@dataclass(frozen=True)
class Part:
    """What a file holds already."""

    rows: int
    size: int  # bytes, up to the end of the last whole row


class PreferenceFile:
    """A JSONL file with one comparison a line, in the order of the data that it is made from.

    A process that is stopped in the middle leaves whole rows and at most one half-written line, which the next one
    writes again.

    Args:
        path: the file; it need not exist.
        source: what messages call the data.
    """

    def __init__(self, path: Path, source: str) -> None:
        self.path, self.source = path, source

    def verify(
        self,
        count: int,
        expected: Callable[[int], Comparison],
        problem: Callable[[Comparison, Comparison], str | None],
    ) -> Part:
        """Compare what the file holds with the data; nothing is changed.

        Args:
            count: rows of the data.
            expected: the comparison of a row, counted from 0.
            problem: what is wrong with the labels of a row of the file (the second argument, after that of the data),
                or ``None``; called once for each row, in order.

        Raises:
            UserError: a line that is no row, a row of other data or with other labels, or too many rows.
        """
        rows = size = 0
        if not self.path.exists():
            return Part(0, 0)
        with self.path.open("rb") as lines:
            for line in lines:
                if rows == count:
                    raise UserError(f"'{self.path}' holds more rows than the {count} of {self.source}; {_ELSEWHERE}")
                given = expected(rows)
                if not line.endswith(b"\n"):
                    found: str | None = self._other_start(line, given)
                else:
                    found = self._other_row(line, given, problem)
                if found:
                    raise UserError(f"'{self.path}' row {rows + 1} {found}; {_ELSEWHERE}")
                if line.endswith(b"\n"):
                    rows, size = rows + 1, size + len(line)
        return Part(rows, size)

    def resume(self, part: Part) -> BinaryIO:
        """Open the file after what was verified; a half-written line there is removed.

        Raises:
            UserError: the file cannot be written.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            opened = self.path.open("ab")
        except OSError as error:
            raise UserError(f"'{self.path}' cannot be written: {error.strerror}") from error
        opened.truncate(part.size)
        return opened

    def _other_row(
        self, line: bytes, given: Comparison, problem: Callable[[Comparison, Comparison], str | None]
    ) -> str | None:
        try:
            record = json.loads(line)
        except ValueError:  # of JSON, or of UTF-8
            return "is not JSON"
        if not isinstance(record, dict):
            return "is not a JSON object"
        try:
            found = Candidates().read(record)
        except BadRowError as error:
            return f"cannot be read: {error}"
        if found.prompt != given.prompt:
            return f"has another prompt than that of {self.source}"
        if found.responses != given.responses:
            return f"has other responses than that of {self.source}"
        return problem(given, found)

    def _other_start(self, tail: bytes, given: Comparison) -> str | None:
        """A file that ends within a line may be anything; only the start of the row that is due may be cut off."""
        start = _encoded({**to_record(given), "preferences": {}}).removesuffix(b"}}")
        ours = tail.startswith(start) or start.startswith(tail)
        return None if ours else f"is not that of {self.source}"


def write_rows(opened: BinaryIO, comparisons: Sequence[Comparison]) -> None:
    """Write whole rows, and hand them to the operating system at once."""
    opened.write(b"".join(_encoded(to_record(comparison)) + b"\n" for comparison in comparisons))
    opened.flush()


class Tally:
    """Counts what became of the labels.

    Args:
        names: of the objectives.
        overwrite: labels that are there may be replaced.
    """

    def __init__(self, names: Sequence[str], overwrite: bool) -> None:
        self.names, self.overwrite = names, overwrite
        self._bare = 0  # rows without any label
        self._counts = {name: dict.fromkeys(("there", "replaced", "filled", "part", "open"), 0) for name in names}

    def add(self, given: Comparison, written: Comparison) -> str | None:
        """Count a row. Returns why it cannot be the labelled form of the given one, or ``None``."""
        before, after = to_record(given)["preferences"], to_record(written)["preferences"]
        names = list(dict.fromkeys([*before, *self.names]))
        if set(after) != set(names):
            return (
                f"was written with other objectives (its labels: {', '.join(after) or 'none'}; now {', '.join(names)})"
            )
        for name, old in before.items():
            mine = name in self.names and (self.overwrite or old is None)
            if after[name] != old and not mine:
                return f"has another label '{name}' than the data"
        for name, count in self._counts.items():
            old, new = before.get(name), after[name]
            count["there"] += old is not None
            count["replaced"] += old is not None and new != old
            count["filled"] += old is None and new is not None
            count["part"] += old is None and new is not None and any(None in line for line in new["wins"])
            count["open"] += new is None
        self._bare += not any(after.values())
        return None

    def lines(self) -> list[str]:
        """One line for each objective, and one on rows that training does not take."""
        lines = [
            f"{name}: {count['there']} labels were there"
            + (f" ({count['replaced']} of them replaced)" if self.overwrite else "")
            + f", {count['filled']} filled"
            + (f" ({count['part']} of them in part)" if count["part"] else "")
            + f", {count['open']} left open"
            for name, count in self._counts.items()
        ]
        bare = f"{self._bare} rows have no label at all; to train, leave them out with --data.on_bad_row=skip"
        return [*lines, bare] if self._bare else lines
