"""Loading rows from files and from the hub, with errors that name the line."""

import csv
import difflib
import gzip
import io
import json
import math
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from moa_lightning.errors import UserError

if TYPE_CHECKING:  # with pandas and pyarrow, 80 MB that a command needs only once it reads a file
    import datasets

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_PART = 10 << 20  # characters
_KNOWN = "use .jsonl, .ndjson, .json, .csv or .tsv (each also with .gz), or .parquet"


def load_rows(path: str, split: str | None = None, subset: str | None = None) -> "datasets.Dataset":
    """Load rows of a JSONL, JSON, CSV, TSV or Parquet file, or of a dataset on the hub or in a folder.

    They are memory-mapped from the cache of ``datasets`` (``HF_DATASETS_CACHE``); nothing is written next to the file.

    Args:
        path: file, hub id, or folder in the layout of a hub dataset. A ``.json`` file holds a list of objects, or one
            object per line.
        split: of a hub data set, in the notation of ``datasets`` (``train[:100]``); ``None`` is ``train``.
        subset: configuration of a hub data set.

    Raises:
        UserError: one line with what is wrong with the file, and where, or that the id does not load.
    """
    file = Path(path).expanduser()
    kind = _format(file)
    if file.is_dir() or (not file.exists() and kind is None and _HUB_ID.fullmatch(path)):
        return _from_hub(str(file), split or "train", subset)
    if not file.exists():
        raise UserError(f"data file '{path}' does not exist{_neighbour(file)}")
    if kind is None:
        raise UserError(f"'{path}' is of no known format; {_KNOWN}")
    if split is not None or subset is not None:
        raise UserError(f"split and subset are for hub data sets, but '{path}' is a file; leave them out")
    if file.stat().st_size == 0:
        raise UserError(f"'{path}' is empty")
    builder, check, options = kind
    with _one_line(path):
        check(file)
    try:
        with _without_progress_bar():
            rows = _load(builder, file, options)
    except Exception as error:
        # The builders raise errors of any type, wrapped several times; the innermost one has the reason.
        raise UserError(f"'{path}' does not load as {builder}: {_innermost(error)}") from error
    if len(rows) == 0:
        raise UserError(f"'{path}' holds no rows")
    return rows


def _load(builder: str, file: Path, options: dict[str, Any]) -> "datasets.Dataset":
    import datasets
    from datasets.exceptions import DatasetGenerationError

    load = partial(datasets.load_dataset, builder, data_files=str(file), split="train", **options)
    try:
        return load()
    except DatasetGenerationError:
        if builder != "json":
            raise
        try:  # the builder infers the fields from the first 10 MB, but later rows may have others
            return load(features=_all_fields(file))
        except Exception:  # noqa: BLE001  # then the first error has the reason
            pass
        raise


def _all_fields(file: Path) -> "datasets.Features":
    """The fields of all lines of a JSONL file, which is read in parts."""
    import datasets
    import pyarrow as pa
    from pyarrow.json import ReadOptions, read_json

    schema = pa.schema([])
    with _open_text(file) as lines:
        while part := "".join(lines.readlines(_PART)).encode():
            found = read_json(io.BytesIO(part), read_options=ReadOptions(block_size=len(part))).schema
            schema = pa.unify_schemas([schema, found], promote_options="permissive")
    return datasets.Features.from_arrow_schema(schema)


def require_columns(rows: "datasets.Dataset", names: Iterable[str], path: str) -> None:
    """Refuse rows that lack one of the columns.

    Raises:
        UserError: one line with the missing column, the existing ones, and the closest match.
    """
    for name in names:
        if name not in rows.column_names:
            near = difflib.get_close_matches(name, rows.column_names, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise UserError(f"'{path}' has no column '{name}'; it has {', '.join(rows.column_names)}{hint}")


def place(path: str, index: int) -> str:
    """Location of a row of :func:`load_rows`, for messages; in JSONL its line, which depends on empty lines.

    Args:
        path: as given to :func:`load_rows`.
        index: of the row, from 0.
    """
    file = Path(path).expanduser()
    if file.is_file() and Path(file.name.lower().removesuffix(".gz")).suffix in (".jsonl", ".ndjson"):
        with _open_text(file) as lines:
            numbers = (number for number, line in enumerate(lines, start=1) if line.strip())
            return f"'{path}' line {next(islice(numbers, index, None))}"
    return f"'{path}' row {index + 1}"


def _format(file: Path) -> tuple[str, Callable[[Path], None], dict[str, Any]] | None:
    """The builder of ``datasets``, the check of the file, and the builder's options, by the file name's ending."""
    name = file.name.lower()
    plain = name.removesuffix(".gz")
    # Otherwise pandas reads the texts "NA" and "None" as missing values.
    missing: dict[str, Any] = {"keep_default_na": False, "na_values": [""]}
    formats: dict[str, tuple[str, Callable[[Path], None], dict[str, Any]]] = {
        ".jsonl": ("json", _check_jsonl, {}),
        ".ndjson": ("json", _check_jsonl, {}),
        ".json": ("json", _check_json, {}),
        ".csv": ("csv", partial(_check_csv, delimiter=","), missing),
        ".tsv": ("csv", partial(_check_csv, delimiter="\t"), {**missing, "delimiter": "\t"}),
    }
    if name.endswith(".parquet"):
        return "parquet", _check_nothing, {}
    return formats.get(Path(plain).suffix)


def _check_nothing(file: Path) -> None:
    """Do nothing: the Parquet reader checks files itself."""


def _check_jsonl(file: Path) -> None:
    with _open_text(file) as lines:
        empty = True
        for number, line in enumerate(lines, start=1):
            if line.strip():
                empty = False
                _check_object(line, f"line {number}")
        if empty:
            raise _Malformed(" is empty")


def _check_object(line: str, where: str) -> None:
    try:
        value = _parsed(line.rstrip())  # otherwise the column may be that of the line's end
    except _Malformed as error:
        raise _Malformed(f", {where}{error}") from error
    except json.JSONDecodeError as error:
        raise _Malformed(f", {where} is not JSON: {error.msg} at column {error.colno}") from error
    if not isinstance(value, dict):
        raise _Malformed(f', {where} is not a JSON object; write one object a line, such as {{"prompt": "..."}}')


def _parsed(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_refuse_constant, parse_int=_number, parse_float=_number)
    except RecursionError as error:
        raise _Malformed(" is nested too deeply to be data") from error


def _refuse_constant(name: str) -> float:
    raise _Malformed(f" holds {name}, which is no JSON value; write null")


def _number(text: str) -> float:
    """Parse a number; one that is too large for a float would become infinity."""
    number = float(text)
    if math.isinf(number):
        raise _Malformed(f" holds a number that is too large ({text[:20]}...); write it as text, or null")
    return number


def _check_json(file: Path) -> None:
    with _open_text(file) as opened:
        text = opened.read()
    if not text.strip():
        raise _Malformed(" is empty")
    try:
        rows = _parsed(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text.lstrip().startswith("{"):  # one object a line
            _check_jsonl(file)
            return
        raise _Malformed(f", line {error.lineno} is not JSON: {error.msg} at column {error.colno}") from error
    if isinstance(rows, dict):
        rows = [rows]
    if not isinstance(rows, list) or not rows:
        raise _Malformed(" must hold a list of objects, one a row")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise _Malformed(f", row {number} is not a JSON object")


def _check_csv(file: Path, delimiter: str) -> None:
    with _open_text(file, newline="") as lines:
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        started = 1
        try:
            header = next(reader, [])
            if not header:
                raise _Malformed(", line 1 must name the columns")
            repeated = [name for i, name in enumerate(header) if name in header[:i]]
            if repeated:
                raise _Malformed(f", line 1 names column '{repeated[0]}' twice")
            started = reader.line_num + 1
            empty = True
            for row in reader:
                empty = empty and not row
                if row and len(row) != len(header):
                    raise _Malformed(
                        f", line {started} has {len(row)} fields, but there are {len(header)} columns; put text that "
                        "holds the separator in quotes"
                    )
                started = reader.line_num + 1
            if empty:
                raise _Malformed(" holds no rows")
        except csv.Error as error:
            raise _Malformed(f", the row that starts at line {started} is not CSV: {error}") from error


class _Malformed(UserError):
    """What is wrong with a file; the message continues the file's name."""


@contextmanager
def _one_line(path: str) -> Iterator[None]:
    try:
        yield
    except _Malformed as error:
        raise UserError(f"'{path}'{error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"'{path}' is not UTF-8 text (byte {error.object[error.start]:#04x}); convert it") from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"'{path}' is not a complete gzip file: {error}") from error


@contextmanager
def _open_text(file: Path, newline: str | None = None) -> Iterator[IO[str]]:
    opener: Callable[..., IO[str]] = gzip.open if file.suffix.lower() == ".gz" else open
    with opener(file, "rt", encoding="utf-8-sig", newline=newline) as opened:
        yield opened


@contextmanager
def _without_progress_bar() -> Iterator[None]:
    """Context manager: disables the progress bars of datasets, as reading a file is not a download."""
    import datasets

    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def _from_hub(path: str, split: str, subset: str | None) -> "datasets.Dataset":
    import datasets

    try:
        return datasets.load_dataset(path, subset, split=split)
    except Exception as error:
        raise UserError(
            f"'{path}' is no data file here and does not open as a hub data set (split '{split}'): {_innermost(error)}"
        ) from error


def _innermost(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:200] or type(error).__name__


def _neighbour(file: Path) -> str:
    names = [other.name for other in file.parent.iterdir()] if file.parent.is_dir() else []
    near = difflib.get_close_matches(file.name, names, n=1)
    return f"; did you mean '{file.with_name(near[0])}'?" if near else ""
