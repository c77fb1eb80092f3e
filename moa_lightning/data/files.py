"""Rows from files and from the hub, through ``datasets``, with errors that name the line."""

import csv
import difflib
import gzip
import json
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

from datasets import Dataset, load_dataset
from datasets.utils.logging import disable_progress_bar

_BUILDERS = {".jsonl": "json", ".ndjson": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}


def load_rows(path: str, split: str = "train", limit: int | None = None) -> Dataset:
    """Rows of a JSONL, JSON, CSV, TSV or Parquet file (``.gz`` too), or of a data set on the hub.

    Args:
        path: file, or hub id.
        split: of a data set on the hub.
        limit: keep the first rows only.

    Raises:
        ValueError: the file is missing, empty, malformed (with the line), or of an unknown kind.
    """
    file = Path(path).expanduser()
    suffixes = [s for s in file.suffixes if s != ".gz"]
    kind = _BUILDERS.get(suffixes[-1]) if suffixes else None
    if not file.exists():
        if kind is not None or path.startswith((".", "/", "~")):
            raise ValueError(f"data file '{path}' does not exist")
        rows = _from_hub(path, split)
    elif file.is_dir():
        rows = _from_hub(str(file), split)
    elif kind is None:
        raise ValueError(f"'{path}' is of an unknown kind; use {', '.join(_BUILDERS)} (or .gz of these)")
    else:
        _check(file, suffixes[-1])
        disable_progress_bar()
        options: dict[str, Any] = {"delimiter": "\t"} if suffixes[-1] == ".tsv" else {}
        rows = load_dataset(kind, data_files=str(file), split="train", **options)
    if len(rows) == 0:
        raise ValueError(f"'{path}' has no rows")
    return rows.select(range(min(limit, len(rows)))) if limit is not None else rows


def require_column(rows: Dataset, column: str, path: str) -> None:
    """Refuse rows without a column.

    Raises:
        ValueError: names the columns there are.
    """
    if column not in rows.column_names:
        best = difflib.get_close_matches(column, rows.column_names, n=1)
        raise ValueError(
            f"'{path}' has no column '{column}'{f'; did you mean {best[0]!r}?' if best else ''} "
            f"Its columns: {', '.join(rows.column_names)}"
        )


def _from_hub(path: str, split: str) -> Dataset:
    try:
        return load_dataset(path, split=split)
    except (OSError, ValueError, ConnectionError) as error:
        first = str(error).strip().splitlines()[0][:200]
        raise ValueError(f"'{path}' is no file here and does not open as a data set of the hub ({first})") from error


def _check(file: Path, suffix: str) -> None:
    """Find the first malformed line ourselves: ``datasets`` names none."""
    if suffix == ".parquet":
        return
    if file.stat().st_size == 0:
        raise ValueError(f"'{file}' is empty")
    try:
        with _open(file) as lines:
            if suffix in {".csv", ".tsv"}:
                _check_table(lines, file, "\t" if suffix == ".tsv" else ",")
            elif suffix != ".json":
                _check_lines(lines, file)
            else:
                _check_document(lines, file)
    except UnicodeDecodeError as error:
        raise ValueError(f"'{file}' is not UTF-8 text: {error.reason} at byte {error.start}") from error
    except (gzip.BadGzipFile, EOFError) as error:
        raise ValueError(f"'{file}' is not a whole gzip file: {error}") from error


def _open(file: Path) -> IO[str]:
    if file.suffix == ".gz":
        return gzip.open(file, "rt", encoding="utf-8")
    return file.open(encoding="utf-8")


def _check_lines(lines: Iterable[str], file: Path) -> None:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"'{file}', line {number}: not JSON ({error.msg} at column {error.colno})") from error
        if type(row) is not dict:
            raise ValueError(f"'{file}', line {number}: a row must be an object with columns, not {type(row).__name__}")


def _check_document(lines: IO[str], file: Path) -> None:
    text = lines.read()
    if text.lstrip().startswith("["):
        try:
            json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"'{file}', line {error.lineno}: not JSON ({error.msg})") from error
    else:  # one object a line under the name .json, as many data sets have it
        _check_lines(text.splitlines(), file)


def _check_table(lines: Iterable[str], file: Path, delimiter: str) -> None:
    reader = csv.reader(lines, delimiter=delimiter)
    header = next(reader, [])
    for row in reader:
        if row and len(row) != len(header):
            raise ValueError(f"'{file}', line {reader.line_num}: {len(row)} fields where the header has {len(header)}")
