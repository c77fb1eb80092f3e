"""Prompts from files: what becomes a prompt, who is held out, and what is refused."""

import json

import datasets
import pytest

from moa_lightning.data import Prompts, Stage
from moa_lightning.data.dialogues import hh_prompt, split_dialogue

STAGES = list(Stage)
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]


def questions(count, **columns):
    return [{"prompt": f"question {i}", "source": i, **columns} for i in range(count)]


def write(file, rows):
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def sources(data, stage):
    return [row["source"] for row in data.rows(stage)]


def shout(row):
    if row["source"] == 2:
        raise KeyError("no\nluck")
    return row["text"].upper()


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "parquet", "jsonl.gz"])
def test_rows_come_from_every_format(tmp_path, ending):
    file = tmp_path / f"rows.{ending}"
    rows = datasets.Dataset.from_list(questions(6))
    datasets.disable_progress_bars()
    if ending == "csv":
        rows.to_csv(file)
    elif ending == "parquet":
        rows.to_parquet(file)
    else:
        rows.to_json(file, compression="gzip" if ending.endswith("gz") else None, lines=ending != "json")
    data = Prompts(str(file), val_size=0)
    assert data.rows(Stage.TRAIN) == questions(6)
    assert data.columns == {"source"}


@pytest.mark.parametrize("split_seed", [0, 1, 2])
def test_held_out_rows_are_those_of_the_split_seed(tmp_path, split_seed):
    file = write(tmp_path / "rows.jsonl", questions(30))
    data = Prompts(file, val_size=7, split_seed=split_seed)
    train, held_out = sources(data, Stage.TRAIN), sources(data, Stage.VALIDATE)
    assert len(held_out) == 7
    assert sorted(train + held_out) == list(range(30))  # none in both, none lost
    assert (train, held_out) == (sorted(train), sorted(held_out))  # in the order of the file
    assert held_out == sources(data, Stage.TEST) == sources(data, Stage.PREDICT)
    for seed in (1, 2):
        other = Prompts(file, val_size=7, split_seed=split_seed, seed=seed)
        assert [other.rows(stage) for stage in STAGES] == [data.rows(stage) for stage in STAGES]
    assert sources(Prompts(file, val_size=7, split_seed=split_seed + 1), Stage.VALIDATE) != held_out


def test_limits_do_not_change_who_is_held_out(tmp_path):
    file = write(tmp_path / "rows.jsonl", questions(30))
    whole, few = Prompts(file, val_size=7), Prompts(file, val_size=7, limit=3, val_limit=2)
    assert few.rows(Stage.TRAIN) == whole.rows(Stage.TRAIN)[:3]
    for stage in STAGES[1:]:
        assert few.rows(stage) == whole.rows(stage)[:2]


def test_files_of_their_own(tmp_path):
    files = [write(tmp_path / f"{i}.jsonl", questions(4)[i:]) for i in range(3)]
    data = Prompts(files[0], val_path=files[1], test_path=files[2])
    assert [len(data.rows(stage)) for stage in STAGES] == [4, 3, 2, 2]
    assert [len(Prompts(files[0], val_path=files[1]).rows(stage)) for stage in STAGES] == [4, 3, 3, 3]


def test_splits_of_a_data_set(tmp_path):
    for i, name in enumerate(["train", "validation", "test"]):
        write(tmp_path / "set" / f"{name}.jsonl", questions(6)[i:])
    data = Prompts(str(tmp_path / "set"), val_split="validation", test_split="test")
    assert [len(data.rows(stage)) for stage in STAGES] == [6, 5, 4, 4]
    held_out = Prompts(str(tmp_path / "set"), split="test", val_size=1)
    assert [len(held_out.rows(stage)) for stage in STAGES] == [3, 1, 1, 1]


def test_chat_messages(tmp_path):
    """Messages of one file share their fields; what a message lacks does not come as null to the chat template."""
    named = [{"role": "user", "content": "Hi", "name": "Ann"}]
    file = write(tmp_path / "rows.jsonl", [{"chat": named}, {"chat": MESSAGES}])
    data = Prompts(file, prompt_column="chat", val_size=0)
    assert [row["prompt"] for row in data.rows(Stage.TRAIN)] == [named, MESSAGES]
    datasets.disable_progress_bars()
    datasets.Dataset.from_list([{"chat": named}, {"chat": MESSAGES}]).to_parquet(tmp_path / "rows.parquet")
    data = Prompts(str(tmp_path / "rows.parquet"), prompt_column="chat", val_size=0)
    assert [row["prompt"] for row in data.rows(Stage.TRAIN)] == [named, MESSAGES]


def test_a_prompt_function_makes_the_prompt(tmp_path, monkeypatch):
    monkeypatch.setattr("moa_lightning.data.dialogues.shout", shout, raising=False)
    path = "moa_lightning.data.dialogues.shout"
    file = write(tmp_path / "rows.jsonl", [{"text": "hi", "source": 0}, {"text": "ho", "source": 1}])
    data = Prompts(file, prompt_function=path, val_size=1)
    assert sorted(row["prompt"] for stage in STAGES[:2] for row in data.rows(stage)) == ["HI", "HO"]
    assert data.columns == {"text", "source"}
    file = write(tmp_path / "more.jsonl", [{"text": "hi", "source": 0}, {"text": "ho", "source": 2}])
    with pytest.raises(ValueError, match=r"more\.jsonl' row 2: .*\.shout failed: KeyError: 'no\\nluck'$"):
        Prompts(file, prompt_function=path).prepare_data()
    with pytest.raises(ValueError, match=r"prompt_function '.*ASSISTANT' is of type str, not a function"):
        Prompts(file, prompt_function="moa_lightning.data.dialogues.ASSISTANT").prepare_data()


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (" \n", "row 2: the prompt is empty; remove the row"),
        ([], "row 2: the prompt is empty; remove the row"),
        ([{"role": "user", "content": " "}], "row 2: the prompt is empty; remove the row"),
        (None, "row 2: the prompt must be text or a list of messages with 'role' and 'content' as text, got null"),
        (7, "row 2: the prompt must be text .* got int"),
        ([{"role": "user"}], "row 2: the prompt must be text .* got list"),
        ([{"role": "user", "content": None}], "row 2: the prompt must be text .* got list"),
    ],
    ids=str,
)
def test_what_is_no_prompt(tmp_path, prompt, message):
    file = write(tmp_path / "rows.jsonl", [{"prompt": "fine"}, {"prompt": prompt}, {"prompt": "fine"}])
    with pytest.raises(ValueError, match=message) as caught:
        Prompts(file, val_size=1).rows(Stage.TRAIN)
    assert "rows.jsonl" in str(caught.value)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (
            questions(4),
            {"prompt_column": "promt"},
            "has no column 'promt'; it has prompt, source; did you mean 'prompt'",
        ),
        (questions(4, completions="x"), {}, "has a column 'completions', which reward functions get otherwise"),
        (questions(4, prompts="x"), {}, "has a column 'prompts', which reward functions get otherwise; rename it"),
        (questions(4), {"val_size": 4}, "val_size 4 leaves no training rows of the 4 in .*; lower it, or give"),
        (questions(4), {"split": "train"}, "split and subset are for hub data sets"),
    ],
)
def test_what_is_refused(tmp_path, rows, options, message):
    file = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(ValueError, match=message):
        Prompts(file, **{"val_size": 1, **options}).prepare_data()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"limit": 0}, r"data\.limit must be at least 1 or null, got 0"),
        ({"val_limit": 0}, r"data\.val_limit must be at least 1 or null, got 0"),
        ({"val_size": -1}, r"data\.val_size must be at least 0, got -1"),
        ({"batch_size": 0}, r"data\.batch_size must be at least 1, got 0"),
        ({"val_batch_size": 0}, r"data\.batch_size must be at least 1, got 64 \(val_batch_size 0\)"),
    ],
)
def test_numbers_are_refused_before_anything_is_read(option, message):
    with pytest.raises(ValueError, match=message):
        Prompts("nowhere.jsonl", **option)


def test_other_files_need_the_training_columns(tmp_path):
    train = write(tmp_path / "train.jsonl", questions(4, answer="x"))
    other = write(tmp_path / "other.jsonl", questions(4))
    for name, option in {"validation": {"val_path": other}, "test": {"test_path": other, "val_size": 1}}.items():
        with pytest.raises(ValueError, match=f"the {name} rows have no column 'answer', which the training rows have"):
            Prompts(train, **option).prepare_data()


# Dialogues

OPENING = "\n\nHuman: Hello\n\nAssistant:"


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        (" Hi.", " Go away.", OPENING),
        (" Hi.", None, OPENING),
        (
            " Hi.\n\nHuman: And?\n\nAssistant: A",
            " Hi.\n\nHuman: And?\n\nAssistant: B",
            " Hi.\n\nHuman: And?\n\nAssistant:",
        ),
        (
            " Hi.\n\nHuman: And?\n\nAssistant: A",
            " Ho.\n\nHuman: And?\n\nAssistant: A",
            OPENING,
        ),  # part at the first turn
        (" Hi", " Hi, you.", OPENING),  # one is the beginning of the other
        (" Hi.", "", OPENING),
    ],
)
def test_the_prompt_of_a_pair(chosen, rejected, prompt):
    row = {"chosen": OPENING + chosen, "rejected": None if rejected is None else OPENING + rejected}
    assert hh_prompt(row) == (prompt if prompt == OPENING else OPENING + prompt)


def test_a_dialogue_is_prompt_and_response():
    whole = OPENING + " Hi.\n\nHuman: Bye\n\nAssistant: Bye."
    prompt, response = split_dialogue(whole)
    assert prompt + response == whole
    assert response == " Bye."
    with pytest.raises(ValueError, match=r"a dialogue needs '.*Assistant:' before each answer"):
        split_dialogue("Human: Hello")
    with pytest.raises(ValueError, match="no text in column 'chosen'"):
        hh_prompt({"rejected": whole})


def test_pairs_as_prompts(tmp_path):
    pairs = [{"chosen": OPENING + " Hi.", "rejected": OPENING + " No."}] * 2
    data = Prompts(
        write(tmp_path / "rows.jsonl", pairs), prompt_function="moa_lightning.data.dialogues.hh_prompt", val_size=1
    )
    assert [row["prompt"] for row in data.rows(Stage.TRAIN)] == [OPENING]
