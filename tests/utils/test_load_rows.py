"""Rows from files: every format gives the same rows, and every mistake is told in one line that says where it is."""

import csv
import gzip
import json

import datasets
import pytest

from moa_lightning.utils.load_rows import load_rows, require_columns

ROWS = [
    {"prompt": 'Say "hi", please', "rating": 1},
    {"prompt": "zwei\nZeilen, é", "rating": 2},
    {"prompt": "NA", "rating": 3},
]


def write(file, rows):
    """The rows in the format that the name says."""
    name = file.name.removesuffix(".gz")
    opener = gzip.open if file.suffix == ".gz" else open
    if name.endswith(".parquet"):
        datasets.Dataset.from_list(rows).to_parquet(file)
        return file
    with opener(file, "wt", encoding="utf-8", newline="") as opened:
        if name.endswith(("csv", "tsv")):
            writer = csv.DictWriter(opened, list(rows[0]), delimiter="\t" if name.endswith("tsv") else ",")
            writer.writeheader()
            writer.writerows(rows)
        elif name.endswith(".json"):
            json.dump(rows, opened, indent=1)
        else:
            opened.write("\n".join(json.dumps(row) for row in rows) + "\n\n")  # with an empty line, no mistake
    return file


@pytest.fixture(autouse=True)
def parquet_is_quiet():
    """Writing Parquet in a test shows a progress bar else."""
    datasets.disable_progress_bars()


@pytest.mark.parametrize(
    "ending", ["jsonl", "ndjson", "json", "csv", "tsv", "parquet", "jsonl.gz", "json.gz", "csv.gz", "tsv.gz", "JSONL"]
)
def test_every_format_gives_the_same_rows(tmp_path, ending):
    file = write(tmp_path / f"rows.{ending}", ROWS)
    rows = load_rows(str(file))
    assert rows.column_names == ["prompt", "rating"]
    assert list(rows) == ROWS
    assert list(tmp_path.iterdir()) == [file]  # nothing is written beside it


def test_a_json_file_may_hold_one_object_a_line(tmp_path):
    file = tmp_path / "rows.json"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    assert list(load_rows(str(file))) == ROWS


def test_a_changed_file_is_read_anew(tmp_path):
    """The cache must not answer with the rows that a file of this name used to hold."""
    file = tmp_path / "rows.jsonl"
    for rows in (ROWS[:1], ROWS):
        write(file, rows)
        assert list(load_rows(str(file))) == rows


def test_a_folder_in_the_layout_of_the_hub(tmp_path):
    (tmp_path / "set").mkdir()
    write(tmp_path / "set" / "train.jsonl", ROWS)
    write(tmp_path / "set" / "test.jsonl", ROWS[1:])
    assert list(load_rows(str(tmp_path / "set"))) == ROWS
    assert list(load_rows(str(tmp_path / "set"), "test")) == ROWS[1:]
    assert list(load_rows(str(tmp_path / "set"), "train[1:2]")) == ROWS[1:2]
    with pytest.raises(ValueError, match=r"does not open as a hub data set \(split 'dev'\)"):
        load_rows(str(tmp_path / "set"), "dev")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "is empty"),
        ("a.jsonl", b"\n \n", "is empty"),
        ("a.json", b" ", "is empty"),
        ("a.json", b"[]", "must hold a list of objects"),
        ("a.csv", b"prompt\n", "csv' holds no rows"),
        ("a.csv", b"prompt\n\n", "csv' holds no rows"),
        ("a.jsonl", b'{"prompt": "a"}\n\n{"prompt": \n', "line 3 is not JSON: Expecting value at column 11"),
        ("a.jsonl", b'{"prompt": "a"}\n["b"]\n', "line 2 is not a JSON object; write one object a line"),
        ("a.jsonl", b'{"prompt": "a", "x": NaN}\n', "line 1 holds NaN, which is no JSON value; write null"),
        ("a.json", b'[{"prompt": "a"},\n {"x": -Infinity}]', "json' holds -Infinity, which is no JSON value"),
        ("a.jsonl.gz", gzip.compress(b'{"prompt": "a"}\n{', mtime=0), "line 2 is not JSON"),
        ("a.json", b'[{"prompt": "a"},\n {"prompt" "b"}]', "line 2 is not JSON: Expecting ':' delimiter"),
        ("a.json", b'{"prompt": "a"}\n{"prompt" "b"}', "line 2 is not JSON"),
        ("a.json", b'[{"prompt": "a"}, "b"]', "row 2 is not a JSON object"),
        ("a.csv", b"prompt,x\na,1\nb, and c,2\n", "line 3 has 3 fields, but there are 2 columns; put text"),
        ("a.csv", b'prompt,x\n"a\nb",1\nc\n', "line 4 has 1 fields"),
        ("a.csv", b'prompt,x\na,1\n"b,2\n', "the row that starts at line 3 is not CSV"),
        ("a.csv", b"prompt,prompt\na,b\n", "line 1 names column 'prompt' twice"),
        ("a.csv", b"\nprompt\n", "line 1 must name the columns"),
        ("a.jsonl", '{"prompt": "é"}'.encode("latin-1"), r"is not UTF-8 text \(byte 0xe9\); convert it"),
        ("a.jsonl.gz", gzip.compress(b'{"prompt": "a"}\n', mtime=0)[:-9], "is not a complete gzip file"),
        ("a.jsonl.gz", b'{"prompt": "a"}\n', "is not a complete gzip file"),
        ("a.parquet", b"PAR0", "does not load as parquet"),
        ("a.txt", b"a\n", r"is of no known format; use \.jsonl"),
    ],
)
def test_what_is_wrong_with_a_file(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_rows(str(tmp_path / name))
    assert str(caught.value).startswith(f"'{tmp_path / name}'")
    assert "\n" not in str(caught.value)


def test_text_and_messages_may_share_a_column(tmp_path):
    rows = [{"prompt": "a"}, {"prompt": [{"role": "user", "content": "b"}]}]
    assert list(load_rows(str(write(tmp_path / "a.json", rows)))) == rows


@pytest.mark.parametrize(
    ("early", "late"),
    [
        ({"label": None}, {"label": {"wins": [[0.5, 0.7], [0.3, 0.5]]}}),
        ({}, {"label": {"winner": 1}}),
        ({"label": {"helpful": {"winner": 0}}}, {"label": {"harmless": {"winner": 1}}}),
        ({"label": {"winner": 0}}, {}),
    ],
    ids=["null", "absent", "another field", "absent later"],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_rows_behind_the_first_ten_megabytes_may_have_other_fields(tmp_path, name, early, late):
    text = "x" * 200_000
    rows = [{"prompt": f"{i} {text}", **(late if i == 69 else early)} for i in range(70)]
    found = load_rows(str(write(tmp_path / name, rows)))
    assert found["prompt"] == [row["prompt"] for row in rows]
    assert [without_null(found[i]) for i in (0, 69)] == [without_null(rows[i]) for i in (0, 69)]


def without_null(row):
    """What a row says: rows of one file share their fields."""
    return {k: without_null(v) if isinstance(v, dict) else v for k, v in row.items() if v is not None and v != {}}


def test_what_no_field_holds_is_told_by_the_first_error(tmp_path):
    rows = [{"prompt": "x" * 200_000, "label": "text" if i == 69 else {"winner": 1}} for i in range(70)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    with pytest.raises(ValueError, match=r"a\.jsonl' does not load as json: Couldn't cast array of type string to"):
        load_rows(str(tmp_path / "a.jsonl"))


def test_a_file_that_is_not_there(tmp_path):
    write(tmp_path / "prompts.jsonl", ROWS)
    with pytest.raises(ValueError, match=r"does not exist; did you mean '.*/prompts\.jsonl'\?"):
        load_rows(str(tmp_path / "promts.jsonl"))
    with pytest.raises(ValueError, match="'nobody/nothing' is no data file here and does not open as a hub data set"):
        load_rows("nobody/nothing")


def test_splits_are_not_for_files(tmp_path):
    file = write(tmp_path / "a.jsonl", ROWS)
    with pytest.raises(ValueError, match=r"split and subset are for hub data sets, but .* is a file; leave them out"):
        load_rows(str(file), "test")


def test_a_missing_column_is_told_with_the_nearest(tmp_path):
    rows = load_rows(str(write(tmp_path / "a.jsonl", ROWS)))
    require_columns(rows, ["prompt", "rating"], "a.jsonl")
    with pytest.raises(
        ValueError, match=r"'a\.jsonl' has no column 'promt'; it has prompt, rating; did you mean 'prompt'\?"
    ):
        require_columns(rows, ["rating", "promt"], "a.jsonl")
