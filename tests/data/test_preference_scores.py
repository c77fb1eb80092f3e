"""Numbers that preference data hold for each candidate, from the file to the margin."""

import json
import math

import pytest

from moa_lightning.commands.label.output_file import to_record
from moa_lightning.data.preference_formats import BadRowError, Candidates, ChosenRejected, PreferenceFormat, Ratings
from moa_lightning.data.preferences import Preferences, to_row
from moa_lightning.rewards import FromScores

PAIR = {"prompt": "p", "chosen": "a", "rejected": "b", "s_a": 4, "s_b": 2.5}
OWN = {"prompt": "p", "responses": ["a", "b"], "scores": {"length": [1, None], "style": None}}
RATED = {
    "instruction": "p",
    "completions": [
        {"response": "a", "annotations": {"honesty": {"Rating": "5"}}},
        {"response": "b", "annotations": {"honesty": {"Rating": "N/A"}}},
    ],
}


@pytest.mark.parametrize(
    ("layout", "row", "name", "expected"),
    [
        (ChosenRejected(scores={"help": ["s_a", "s_b"]}), PAIR, "help", [4.0, 2.5]),
        (Candidates(), OWN, "length", [1.0, None]),
        (Candidates(), OWN, "style", [None, None]),
        (Ratings(aspects={"honest": "honesty"}), RATED, "honest", [5.0, None]),
    ],
)
def test_formats_keep_them(layout: PreferenceFormat, row: dict, name: str, expected: list) -> None:
    read = to_row(layout.read(row))
    reward = FromScores(name)
    reward.check(set(read))
    assert reward.score(["p", "p"], ["a", "b"], **{f"scores/{name}": read[f"scores/{name}"]}) == expected


def test_they_survive_moa_labels_file() -> None:
    again = Candidates().read(json.loads(json.dumps(to_record(Candidates().read(OWN)))))
    assert again.scores["length"][0] == 1.0 and math.isnan(again.scores["length"][1])


@pytest.mark.parametrize("values", [[1.0], "12", [1.0, "x"], {"a": 1}])
def test_bad_ones_are_named(values: object) -> None:
    with pytest.raises(BadRowError, match=r"'scores.length'"):
        Candidates().read({**OWN, "scores": {"length": values}})


def test_rows_without_them_are_unknown(tmp_path) -> None:
    rows = [
        {"prompt": f"p{i}", "responses": ["a", "b"], "preferences": {"h": {"winner": 0}}, "scores": {"x": [1.0, 2.0]}}
        for i in range(4)
    ]
    del rows[3]["scores"]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = Preferences(str(path), val_size=1)
    found = [row["scores/x"] for stage in ("fit",) for rows in data.rows_to_check(stage) for row in data.rows(rows)]
    assert sorted(str(values) for values in found) == ["[1.0, 2.0]"] * 3 + ["[nan, nan]"]


def test_data_without_them_are_refused() -> None:
    with pytest.raises(ValueError, match="the data have no scores 'x'; they have y"):
        FromScores("x").check({"scores/y", "wins/x"})
    with pytest.raises(ValueError, match="FromScores goes with data class Preferences"):
        FromScores("x").check({"wins/x"})
