"""Every published layout on rows as they are found, through real files."""

import json
import math

import datasets
import pytest

from moa_lightning.data import Candidates, ChosenRejected, Preferences, Ratings, SafeRLHF, Stage
from moa_lightning.data.preference_formats import BadRowError
from moa_lightning.data.preferences import to_row

NAN = math.nan


def read(path, rows, layout=None):
    """The rows as the sources get them, out of a JSONL or Parquet file."""
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(str(path))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Preferences(str(path), format=layout, val_size=0).rows(Stage.TRAIN)


def wins(row, name):
    return [pytest.approx(value, abs=1e-6, nan_ok=True) for value in row[f"wins/{name}"]]


@pytest.fixture(params=["data.jsonl", "data.parquet"])
def file(request, tmp_path):
    return tmp_path / request.param


def test_own_layout(file):
    three = [[0.5, 0.9, 0.6], [0.1, 0.5, None], [0.4, None, 0.5]]
    given = [
        {"prompt": "a", "responses": ["x", "y"], "preferences": {"h": {"winner": 1}, "k": {"probability": 0.7}}},
        {"prompt": "b", "responses": ["x", "y", "z"], "preferences": {"h": {"wins": three}, "k": None}},
        {"prompt": "c", "responses": ["x", "y", "z"], "preferences": {"k": {"winner": 0}}},
    ]
    rows = read(file, given)
    assert [row["prompt"] for row in rows] == ["a", "b", "c"]
    assert rows[1]["responses"] == ["x", "y", "z"]
    assert wins(rows[0], "h") == [0, 1]
    assert wins(rows[0], "k") == [0.7, 0.3]
    assert wins(rows[1], "h") == [0.75, 0.1, 0.4]  # a comparison that nobody made is left out of the mean
    assert wins(rows[1], "k") == [NAN, NAN, NAN]
    assert wins(rows[2], "h") == [NAN, NAN, NAN]
    assert wins(rows[2], "k") == [1, 0.25, 0.25]  # the losers are on a par, so the mean is 1/2


def test_an_objective_that_first_appears_late_is_unknown_before(tmp_path):
    pair = {"prompt": "a", "responses": ["x", "y"]}
    rows = read(
        tmp_path / "data.jsonl",
        [{**pair, "preferences": {"k": {"winner": 0}}}, {**pair, "preferences": {"h": {"winner": 0}}}],
    )
    assert wins(rows[0], "h") == [NAN, NAN]
    assert {*rows[0]} == {*rows[1]}


def test_chat_prompts_lose_the_fields_they_do_not_have(file):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi", "name": "Ann"}]
    label = {"responses": ["x", "y"], "preferences": {"h": {"winner": 0}}}
    assert read(file, [{"prompt": messages, **label}])[0]["prompt"] == messages


SKY = {"role": "user", "content": "What colour is the sky?"}


def said(text):
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    ("row", "prompt", "responses"),
    [
        ({"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}, "The sky is", [" blue.", " green."]),
        ({"chosen": "The sky is blue.", "rejected": "The sky is green."}, "The sky is", [" blue.", " green."]),
        ({"chosen": "The sky is blue", "rejected": "The sky is bluish"}, "The sky is", [" blue", " bluish"]),
        ({"chosen": "It is so", "rejected": "It is so nice"}, "It is", [" so", " so nice"]),
        ({"prompt": [SKY], "chosen": [said("Blue.")], "rejected": [said("Green.")]}, [SKY], ["Blue.", "Green."]),
        ({"chosen": [SKY, said("Blue.")], "rejected": [SKY, said("Green.")]}, [SKY], ["Blue.", "Green."]),
        # The prompt as text, and once more as the first message.
        (
            {"prompt": SKY["content"], "chosen": [SKY, said("Blue.")], "rejected": [SKY, said("Green.")]},
            [SKY],
            ["Blue.", "Green."],
        ),
        (
            {"prompt": [SKY], "chosen": [SKY, said("Blue.")], "rejected": [SKY, said("Green.")]},
            [SKY],
            ["Blue.", "Green."],
        ),
        # Turns behind the prompt that both share belong to it.
        (
            {"prompt": [SKY], "chosen": [said("?"), SKY, said("Blue.")], "rejected": [said("?"), SKY, said("Red.")]},
            [SKY, said("?"), SKY],
            ["Blue.", "Red."],
        ),
    ],
)
def test_trl(file, row, prompt, responses):
    (found,) = read(file, [row], ChosenRejected())
    assert (found["prompt"], found["responses"]) == (prompt, responses)
    assert wins(found, "preference") == [1, 0]


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt", "responses"),
    [
        ("\n\nHuman: Hi\n\nAssistant: Hello.", "\n\nHuman: Hi\n\nAssistant: No.", "\n\nHuman: Hi\n\nAssistant:", None),
        (
            "\n\nHuman: A\n\nAssistant: B\n\nHuman: C\n\nAssistant: D",
            "\n\nHuman: A\n\nAssistant: B\n\nHuman: C\n\nAssistant: D, E",
            "\n\nHuman: A\n\nAssistant: B\n\nHuman: C\n\nAssistant:",
            [" D", " D, E"],
        ),
        # They part at an earlier turn.
        (
            "\n\nHuman: A\n\nAssistant: B\n\nHuman: C\n\nAssistant: D",
            "\n\nHuman: A\n\nAssistant: Bee\n\nHuman: F\n\nAssistant: G",
            "\n\nHuman: A\n\nAssistant:",
            [" B\n\nHuman: C\n\nAssistant: D", " Bee\n\nHuman: F\n\nAssistant: G"],
        ),
    ],
)
def test_hh_rlhf(file, chosen, rejected, prompt, responses):
    (row,) = read(file, [{"chosen": chosen, "rejected": rejected}], ChosenRejected("harmless"))
    assert row["prompt"] == prompt
    assert row["responses"] == (responses or [" Hello.", " No."])
    assert wins(row, "harmless") == [1, 0]


def test_score_columns_make_objectives(file):
    pair = {"prompt": "a", "chosen": "x", "rejected": "y"}
    rows = read(
        file,
        [
            {**pair, "score_chosen": 7.5, "score_rejected": 8.0, "len_c": 3, "len_r": 3},
            {**pair, "score_chosen": None, "score_rejected": 1.0, "len_c": 2, "len_r": 1},
        ],
        ChosenRejected("overall", {"helpful": ["score_chosen", "score_rejected"], "long": ["len_c", "len_r"]}),
    )
    assert [wins(rows[0], name) for name in ("overall", "helpful", "long")] == [[1, 0], [0, 1], [0.5, 0.5]]
    assert wins(rows[1], "helpful") == [NAN, NAN]
    assert wins(rows[1], "long") == [1, 0]


@pytest.mark.parametrize("columns", [["a"], ["a", "b", "c"]])
def test_score_columns_come_in_pairs(columns):
    with pytest.raises(ValueError, match=r"ChosenRejected.scores.h must be \[column of chosen, column of rejected\]"):
        ChosenRejected(scores={"h": columns})
    with pytest.raises(ValueError, match="under another name than objective 'h'"):
        ChosenRejected("h", scores={"h": ["a", "b"]})


def test_safe_rlhf(file):
    pair = {"prompt": "How?", "response_0": "Thus.", "response_1": "No.", "is_response_0_safe": False}
    rows = read(
        file,
        [
            {**pair, "better_response_id": 0, "safer_response_id": 1},
            {**pair, "better_response_id": -1, "safer_response_id": 0},
            {**pair, "better_response_id": 1, "safer_response_id": None},
        ],
        SafeRLHF(better="useful"),
    )
    assert rows[0]["responses"] == ["Thus.", "No."]
    assert [wins(row, "useful") for row in rows] == [[1, 0], [NAN, NAN], [0, 1]]
    assert [wins(row, "harmless") for row in rows] == [[0, 1], [1, 0], [NAN, NAN]]


def test_ultrafeedback(file):
    def completion(text, help_rating, honesty):
        return {
            "response": text,
            "model": "some",
            "annotations": {"helpfulness": {"Rating": help_rating}, "honesty": {"Rating": honesty}},
        }

    given = [completion("x", "5", "4"), completion("y", "3", "N/A"), completion("z", "3", "1")]
    aspects = {"help": "helpfulness", "honest": "honesty"}
    (row,) = read(file, [{"instruction": "Go", "completions": given}], Ratings(aspects))
    assert (row["prompt"], row["responses"]) == ("Go", ["x", "y", "z"])
    assert wins(row, "help") == [1, 0.25, 0.25]
    assert wins(row, "honest") == [NAN, NAN, NAN]


OWN = {"prompt": "a", "responses": ["x", "y"], "preferences": {"h": {"winner": 0}}}
PAIR = {"prompt": "a", "chosen": "x", "rejected": "y"}
SAFE = {"prompt": "a", "response_0": "x", "response_1": "y", "better_response_id": 0, "safer_response_id": 1}
RATED = {"instruction": "a", "completions": [{"response": "x"}, {"response": "y"}]}


def labelled(label, count=2):
    return {**OWN, "responses": ["x", "y", "z"][:count], "preferences": {"h": label}}


def without(row, name):
    return {key: value for key, value in row.items() if key != name}


@pytest.mark.parametrize(
    ("layout", "row", "message"),
    [
        (Candidates(), without(OWN, "prompt"), "there is no 'prompt'; the row has responses, preferences"),
        (Candidates(), {**OWN, "prompt": None}, "'prompt' is missing"),
        (Candidates(), {**OWN, "prompt": 3}, "'prompt' must be text or a list, got 3"),
        (Candidates(), {**OWN, "prompt": " \n"}, "'prompt' is empty"),
        (Candidates(), {**OWN, "prompt": []}, "'prompt' must be text or a list of messages with 'role' and 'content'"),
        (Candidates(), {**OWN, "prompt": [{"role": "user"}]}, "'prompt' must be text or a list of messages with"),
        (Candidates(), {**OWN, "prompt": [{"role": "user", "content": " "}]}, "'prompt' is empty"),
        (Candidates(), without(OWN, "responses"), "there is no 'responses'; the row has prompt, preferences"),
        (Candidates(), {**OWN, "responses": None}, "'responses' is missing"),
        (Candidates(), {**OWN, "responses": "x"}, "'responses' must be a list, got 'x'"),
        (Candidates(), {**OWN, "responses": ["x"]}, "'responses' must hold two or more, it holds 1"),
        (Candidates(), {**OWN, "responses": ["x", None]}, "'responses[1]' is missing"),
        (Candidates(), {**OWN, "responses": [4, "x"]}, "'responses[0]' must be text, got 4"),
        (Candidates(), {**OWN, "responses": ["x", " "]}, "'responses[1]' is empty"),
        (Candidates(), {**OWN, "responses": ["x", "y", "x"]}, "'responses[0]' and 'responses[2]' are identical"),
        (Candidates(), {**OWN, "preferences": [1]}, "'preferences' must be an object, got [1]"),
        (Candidates(), labelled(0), "'preferences.h' must hold winner, probability or wins, such as {\"winner\": 0}"),
        (Candidates(), labelled({"victor": 0}), "one of winner, probability and wins; it has victor"),
        # Contradictory labels: two of them, whatever they say.
        (
            Candidates(),
            labelled({"winner": 0, "probability": 0.2}),
            "'preferences.h' must hold one of winner, probability and wins; it has winner, probability",
        ),
        (
            Candidates(),
            labelled({"winner": 2}),
            "'preferences.h': winner 2 is no candidate; there are 2, counted from 0",
        ),
        (Candidates(), labelled({"winner": -1}), "'preferences.h': winner -1 is no candidate"),
        (Candidates(), labelled({"winner": "x"}), "the winner must be the index of a response, got 'x'"),
        (Candidates(), labelled({"winner": 0.5}), "the winner must be the index of a response, got 0.5"),
        (Candidates(), labelled({"winner": math.inf}), "the winner must be the index of a response, got inf"),
        (Candidates(), labelled({"winner": True}), "the winner must be the index of a response, got True"),
        (
            Candidates(),
            labelled({"probability": 1.2}),
            "'preferences.h': a win probability must lie in [0, 1], got 1.2",
        ),
        (Candidates(), labelled({"probability": -0.1}), "a win probability must lie in [0, 1], got -0.1"),
        (Candidates(), labelled({"probability": "0.3"}), "a win probability must lie in [0, 1], got '0.3'"),
        (
            Candidates(),
            labelled({"probability": 0.3}, 3),
            "'preferences.h': one probability compares two responses, but there are 3; give a win matrix",
        ),
        (
            Candidates(),
            labelled({"wins": [[0.5, 0.7], [0.4, 0.5]]}),
            "'preferences.h': entries (1, 0) and (0, 1) of the win matrix are 0.4 and 0.7; they must add to 1",
        ),
        (
            Candidates(),
            labelled({"wins": [[0.5, None], [0.4, 0.5]]}),
            "entries (1, 0) and (0, 1) of the win matrix are 0.4 and nan; they must add to 1",
        ),
        (Candidates(), labelled({"wins": [[0.5, 1.5], [-0.5, 0.5]]}), "a win probability must lie in [0, 1], got 1.5"),
        (
            Candidates(),
            labelled({"wins": [[0.5, 1], [0, 0.5]]}, 3),
            "the win matrix must be 3 x 3, one line and column",
        ),
        (Candidates(), labelled({"wins": [[0.5, 1], [0]]}), "the win matrix must be 2 x 2"),
        (Candidates(), labelled({"wins": [1, 0]}), "the win matrix must be 2 x 2"),
        (Candidates(), labelled({"wins": 0.5}), "the win matrix must be 2 x 2"),
        (ChosenRejected(), without(PAIR, "chosen"), "there is no 'chosen'; the row has prompt, rejected"),
        (ChosenRejected(), {**PAIR, "rejected": None}, "'rejected' is missing"),
        (ChosenRejected(), {**PAIR, "prompt": None}, "'prompt' is missing"),
        (ChosenRejected(), {**PAIR, "prompt": 1}, "'prompt' must be text or a list, got 1"),
        (ChosenRejected(), {**PAIR, "rejected": "x"}, "'chosen' and 'rejected' are identical"),
        (ChosenRejected(), {**PAIR, "rejected": " "}, "'rejected' is empty"),
        (
            ChosenRejected(),
            {**PAIR, "rejected": [SKY]},
            "'chosen' and 'rejected' must both be text or both be messages",
        ),
        (ChosenRejected(), {"chosen": "Yes", "rejected": "No"}, "share no prompt; give a column 'prompt'"),
        (ChosenRejected(), {"chosen": "Yes it is", "rejected": "No it is"}, "share no prompt; give a column 'prompt'"),
        (ChosenRejected(), {**PAIR, "chosen": [], "rejected": [SKY]}, "'chosen' must be text or a list of messages"),
        (
            ChosenRejected(),
            {"chosen": [SKY], "rejected": [said("x")]},
            "hold one message each, and there is no 'prompt'",
        ),
        (
            ChosenRejected(),
            {"chosen": [SKY, said("x")], "rejected": [said("z"), said("y")]},
            "'chosen' and 'rejected' differ before their last message; they must share the rest",
        ),
        (
            ChosenRejected(),
            {"chosen": "\n\nHuman: A\n\nAssistant: B", "rejected": "\n\nHuman: A\n\nAssistant:"},
            "'rejected' is empty",
        ),
        (ChosenRejected(scores={"h": ["a", "b"]}), {**PAIR, "a": 1}, "there is no 'b'; the row has"),
        (
            ChosenRejected(scores={"h": ["a", "b"]}),
            {**PAIR, "a": 1, "b": "good"},
            "'h': scores must be numbers, got [1,",
        ),
        (SafeRLHF(), without(SAFE, "safer_response_id"), "there is no 'safer_response_id'; the row has prompt"),
        (SafeRLHF(), {**SAFE, "better_response_id": 2}, "'better_response_id': winner 2 is no candidate; there are 2"),
        (SafeRLHF(), {**SAFE, "response_1": None}, "'response_1' is missing"),
        (SafeRLHF(), {**SAFE, "response_1": "x"}, "'response_0' and 'response_1' are identical"),
        (Ratings(), without(RATED, "instruction"), "there is no 'instruction'; the row has completions"),
        (Ratings(prompt_column="prompt"), RATED, "there is no 'prompt'; the row has instruction, completions"),
        (Ratings(), {**RATED, "completions": []}, "'completions' must hold two or more, it holds 0"),
        (Ratings(), {**RATED, "completions": ["x", "y"]}, "'completions' must hold objects with 'response'"),
        (Ratings(), {**RATED, "completions": [{"response": "x"}, {}]}, "'completions[1].response' is missing"),
        (
            Ratings(),
            {**RATED, "completions": [{"response": t, "annotations": {"honesty": {"Rating": "high"}}} for t in "xy"]},
            "'honesty': scores must be numbers, got ['high', 'high']",
        ),
    ],
)
def test_what_is_wrong_with_a_row(layout, row, message):
    with pytest.raises(BadRowError) as caught:
        to_row(layout.read(row))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_rows_above_are_bad_for_what_they_change():
    for layout, row in (
        (Candidates(), OWN),
        (ChosenRejected(), PAIR),
        (ChosenRejected(scores={"h": ["a", "b"]}), {**PAIR, "a": 1, "b": 2}),
        (SafeRLHF(), SAFE),
        (Ratings(), RATED),
    ):
        assert len(to_row(layout.read(row))["responses"]) == 2


def test_candidates_that_nobody_has_compared():
    for row in (without(OWN, "preferences"), {**OWN, "preferences": None}, {**OWN, "preferences": {}}):
        assert to_row(Candidates().read(row)) == {"prompt": "a", "responses": ["x", "y"]}


def test_a_missing_label_may_be_nan_as_tables_write_it():
    assert wins(to_row(Candidates().read(labelled({"winner": NAN}))), "h") == [NAN, NAN]
    assert wins(to_row(SafeRLHF().read({**SAFE, "better_response_id": NAN})), "helpful") == [NAN, NAN]
    assert wins(to_row(Candidates().read(labelled({"wins": [[NAN, 1.0], [0.0, NAN]]}))), "h") == [1, 0]


def test_a_prompt_that_chosen_and_rejected_repeat_is_taken_once() -> None:
    row = {"prompt": "Why? ", "chosen": "Why? Because.", "rejected": "Why? No."}
    read = ChosenRejected().read(row)
    assert (read.prompt, read.responses) == ("Why? ", ["Because.", "No."])
    kept = ChosenRejected().read({**row, "rejected": "No."})  # only one of them: then it is part of the response
    assert kept.responses == ["Why? Because.", "No."]


def test_messages_need_a_role() -> None:
    with pytest.raises(BadRowError, match="messages with 'role' and 'content'"):
        to_row(Candidates().read({"prompt": [{"content": "hi"}], "responses": ["a", "b"]}))


def test_dialogues_that_ask_different_questions_are_no_comparison() -> None:
    row = {"chosen": "\n\nHuman: Hi\n\nAssistant: a", "rejected": "\n\nHuman: Bye\n\nAssistant: b"}
    with pytest.raises(BadRowError, match="differ before the first answer; they must share the question"):
        ChosenRejected().read(row)
