"""Preference rows: where a bad one stands, what is done about it, and which rows each stage gets."""

import gzip
import json
import math
import warnings

import datasets
import pytest
from tokenizers import normalizers

from moa_lightning.data import ChosenRejected, Preferences, Stage
from moa_lightning.models import Encoder
from tests.helpers import tiny


def row(number, good=True):
    preferences = {"h": {"winner": 0}} if good else {"h": {"winner": 5}}
    return {"prompt": f"the film {number}", "responses": ["good", "bad"], "preferences": preferences}


def jsonl(path, rows, between=""):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt") as file:
        file.write("".join(json.dumps(r) + "\n" + between for r in rows))
    return str(path)


def encoder(context=32, longest=8, prompt=None):
    return Encoder(tiny.tokenizer(), (1,), context, longest, prompt, with_candidates=True)


@pytest.mark.parametrize(
    ("name", "between", "place"),
    [
        ("data.jsonl", "", "line 3"),
        ("data.jsonl", "\n", "line 5"),  # empty lines count
        ("data.jsonl.gz", "  \n", "line 5"),
        ("data.parquet", "", "row 3"),
    ],
)
def test_a_bad_row_is_told_with_its_place_and_stops_by_default(tmp_path, name, between, place):
    rows = [row(1), row(2), row(3, good=False), row(4, good=False), row(5)]
    path = str(tmp_path / name)
    if name.endswith("parquet"):
        datasets.Dataset.from_list(rows).to_parquet(path)
    else:
        jsonl(tmp_path / name, rows, between)
    with pytest.raises(ValueError, match=r"set --data\.on_bad_row=skip$") as caught:
        Preferences(path, val_size=1).prepare_data()
    reason = "'preferences.h': winner 5 is no candidate; there are 2, counted from 0"
    assert str(caught.value) == f"'{path}' {place}: {reason}; or set --data.on_bad_row=skip"
    data = Preferences(path, val_size=1, on_bad_row="skip")
    with pytest.warns(UserWarning, match=f"^2 of 5 rows of '{path}' cannot be used and are left out; the first: ") as w:
        data.prepare_data()
    assert str(w[0].message).endswith(f"'{path}' {place}: {reason}")
    assert len(w) == 1
    with warnings.catch_warnings():  # once is enough
        kept = [*data.rows(Stage.TRAIN), *data.rows(Stage.VALIDATE)]
    assert sorted(r["prompt"] for r in kept) == ["the film 1", "the film 2", "the film 5"]


def test_a_row_whose_label_is_of_another_type_has_its_line_too(tmp_path):
    path = jsonl(tmp_path / "data.jsonl", [row(1), {**row(2), "preferences": {"h": "first"}}])
    with pytest.raises(ValueError, match=r"line 2: 'preferences\.h' must hold winner, probability or wins.*'first'"):
        Preferences(path).prepare_data()


@pytest.mark.parametrize("label", [None, {}, {"h": None}], ids=str)
def test_a_row_without_a_label_among_labelled_ones(tmp_path, label):
    path = jsonl(tmp_path / "data.jsonl", [row(1), {**row(2), "preferences": label}, row(3)])
    with pytest.raises(ValueError, match=r"line 2: no objective has a label; or set --data\.on_bad_row=skip$"):
        Preferences(path, val_size=0).prepare_data()
    data = Preferences(path, val_size=0, on_bad_row="skip")
    with pytest.warns(UserWarning, match=r"^1 of 3 rows .* line 2: no objective has a label$"):
        assert [r["prompt"] for r in data.rows(Stage.TRAIN)] == ["the film 1", "the film 3"]


def test_rewards_may_judge_where_nobody_has(tmp_path):
    path = jsonl(tmp_path / "data.jsonl", [{k: v for k, v in row(i).items() if k != "preferences"} for i in range(3)])
    data = Preferences(path, val_size=0)
    assert len(data.rows(Stage.TRAIN)) == 3
    assert data.columns == {"responses"}


@pytest.mark.parametrize("on_bad_row", ["fail", "skip"])
def test_nothing_is_left_where_all_rows_are_bad(tmp_path, on_bad_row):
    path = jsonl(tmp_path / "data.jsonl", [row(1, good=False), row(2, good=False)])
    whole = {"fail": "", "skip": f"none of the 2 rows of '{path}' can be used; the first: "}[on_bad_row]
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the whole line is compared
        Preferences(path, on_bad_row=on_bad_row, val_size=0).prepare_data()
    assert str(caught.value).startswith(f"{whole}'{path}' line 1: 'preferences.h': winner 5")


CUT = "the response of nine words is more than eight"
SHORT = "the film was very long and dull ."
NINE = "response 1 has 10 tokens with its end token, more than "
EIGHT = (
    "the prompt has 8 tokens; with the longest response's 4 it exceeds the policy's context of 11. Remove the row, or"
)


@pytest.mark.parametrize(
    ("changes", "settings", "reason"),
    [
        ({"responses": ["good", "<eos>"]}, {}, "response 1 has no tokens; remove the row"),
        (
            {"responses": ["bad", "good", "good "]},
            {},
            "responses 1 and 2 have the same tokens, so the policy cannot tell them apart; remove the row",
        ),
        ({"responses": ["\u200b\u200b", "good"]}, {}, "response 0 has no tokens; remove the row"),
        (
            {"responses": ["good", CUT]},
            {},
            NINE + "source.max_response_length 8; raise that, or remove the row",
        ),
        (
            {"responses": ["good", CUT]},
            {"context": 9, "longest": 8},
            NINE + "the policy's context of 9 has room for; remove the row",
        ),
        (
            {"prompt": SHORT, "responses": ["good", "bad and dull"]},
            {"context": 11},
            f"{EIGHT} set source.max_prompt_length to keep the end of long prompts. It starts: '{SHORT}'",
        ),
        ({"prompt": "\u200b"}, {}, "the prompt has no tokens; remove the row"),
    ],
)
@pytest.mark.parametrize("stage", ["train", "validate"])
def test_rows_that_the_policy_cannot_read(tmp_path, changes, settings, reason, stage):
    reader = encoder(**settings)
    reader.tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\u200b", "")
    paths = [
        jsonl(tmp_path / f"{name}.jsonl", [row(1), row(2), {**row(3), **changes}] if name == stage else [row(4)], "\n")
        for name in ("train", "validate")
    ]
    where = f"'{tmp_path / stage}.jsonl' line 5: "
    with pytest.raises(ValueError, match="on_bad_row") as caught:
        Preferences(paths[0], val_path=paths[1]).screen("fit", reader.problem)
    assert str(caught.value) == f"{where}{reason}; or set --data.on_bad_row=skip"

    data = Preferences(paths[0], val_path=paths[1], on_bad_row="skip")
    with pytest.warns(UserWarning, match=f"^1 of 3 {stage} rows cannot be used") as found:
        data.screen("fit", reader.problem)
    assert str(found[0].message).endswith(f"the first: {where}{reason}")
    assert [r["prompt"] for r in data.rows(Stage(stage))] == ["the film 1", "the film 2"]
    data.screen("fit", reader.problem)  # says nothing: they are gone


def test_the_end_of_a_long_prompt_fits(tmp_path):
    path = jsonl(tmp_path / "data.jsonl", [{**row(1), "prompt": "dull " * 40}])
    Preferences(path, val_size=0).screen("fit", encoder(prompt=8).problem)


def test_none_of_the_rows_can_be_read(tmp_path):
    path = jsonl(tmp_path / "data.jsonl", [row(1), row(2)])
    data = Preferences(path, val_size=0, on_bad_row="skip")
    with pytest.raises(ValueError, match=r"none of the 2 train rows can be used; the first: .* line 1: "):
        data.screen("fit", encoder(context=4, longest=3).problem)


def test_every_stage_and_row_has_the_columns_of_all(tmp_path):
    other = {**row(9), "responses": ["a", "b", "c"], "preferences": {"k": {"winner": 1}}}
    paths = [jsonl(tmp_path / "a.jsonl", [row(1), row(2)]), jsonl(tmp_path / "b.jsonl", [other])]
    data = Preferences(paths[0], val_path=paths[1])
    assert data.columns == {"responses", "wins/h", "wins/k"}
    (held_out,) = data.rows(Stage.TEST)
    assert held_out["wins/k"] == [0.25, 1, 0.25]
    assert len(held_out["wins/h"]) == 3
    assert all(map(math.isnan, held_out["wins/h"]))


def test_which_rows_are_held_out_depends_on_their_seed_alone(tmp_path):
    path = jsonl(tmp_path / "data.jsonl", [row(i) for i in range(20)])

    def prompts(stage, **settings):
        return [r["prompt"] for r in Preferences(path, val_size=5, **settings).rows(stage)]

    assert prompts(Stage.VALIDATE) == prompts(Stage.VALIDATE, seed=3, batch_size=2)
    assert prompts(Stage.VALIDATE) != prompts(Stage.VALIDATE, split_seed=1)
    assert sorted(prompts(Stage.TRAIN) + prompts(Stage.TEST)) == sorted(f"the film {i}" for i in range(20))
    assert len(prompts(Stage.TRAIN, limit=8)) == 3
    assert {*prompts(Stage.TRAIN, limit=8), *prompts(Stage.PREDICT, limit=8)} == {f"the film {i}" for i in range(8)}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"val_size": 3}, "data.val_size 3 leaves nothing to train on: '.*' has 3 rows; lower it"),
        ({"val_size": -1}, "data.val_size must be at least 0"),
        ({"limit": 0}, "data.limit at least 1 or null"),
        ({"batch_size": 0}, "data.batch_size must be at least 1"),
        ({"format": ChosenRejected()}, "line 1: there is no 'chosen'; the row has prompt, responses, preferences"),
    ],
)
def test_settings_that_cannot_work(tmp_path, settings, message):
    path = jsonl(tmp_path / "data.jsonl", [row(i) for i in range(3)])
    with pytest.raises(ValueError, match=message):
        Preferences(path, **settings).prepare_data()
