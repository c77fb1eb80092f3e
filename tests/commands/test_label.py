"""What ``moa label`` writes: Bradley and Terry's win probabilities, no label that is there changed, no row lost."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from moa_lightning.commands.label.command import label
from moa_lightning.commands.label.comparisons import Comparisons
from moa_lightning.data import Candidates, ChosenRejected, Preferences, Ratings, SafeRLHF, Stage
from moa_lightning.errors import RewardError
from moa_lightning.functional.preference import bradley_terry_wins
from moa_lightning.rewards import FromLabels, FunctionReward, Length, Objective
from tests.cli.task import write_prompts
from tests.helpers import tiny

WORDS = ["good", "bad film", "a dull plot", "fine", "é ü", "very very long", "short"]


def rows(count: int, candidates: int = 3, **more: Any) -> list[dict[str, Any]]:
    """Rows without labels; no two responses of a row are equal."""
    return [
        {"prompt": f"the film {i}", "responses": [f"{WORDS[(i + k) % 7]} {i * k}" for k in range(candidates)], **more}
        for i in range(count)
    ]


def letters(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
    """Letters / 4, and nothing to say about dull texts."""
    return [None if "dull" in text else len(text) / 4 for text in completions]


def company(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """A score that changes with what is scored together, as it does in low precision with the padding."""
    return [len(text) + len("".join(completions)) / (i + 7) for i, text in enumerate(completions)]


class Once:
    """Scores, remembers what it was asked, and fails at a given call."""

    def __init__(self, fail_at: int = -1) -> None:
        self.asked: list[tuple[str, str]] = []
        self.calls, self.fail_at = 0, fail_at

    def __call__(self, prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        self.calls += 1
        if self.calls == self.fail_at:
            raise RuntimeError("the power went")
        self.asked += zip(prompts, completions, strict=True)
        return company(prompts, completions)


def objective(function: Callable[..., Any], **more: Any) -> Objective:
    return Objective(FunctionReward(function), **more)


def written(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_prompts(tmp_path / "data.jsonl", rows(23))
    return tmp_path / "data.jsonl"


# What the labels are.


@pytest.mark.parametrize("win_scale", [1.0, 2.5])
def test_preferences_read_the_labels_as_bradley_terry_wins_of_the_values(
    data: Path, tmp_path: Path, win_scale: float, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new" / "labelled.jsonl"
    wishes = {
        "short": objective(letters, scale=-2.0, shift=1.0, clip=(-2.0, 0.0)),
        "words": Objective(Length(1.0, 0, 9)),
    }
    label(str(output), Comparisons(str(data)), wishes, win_scale=win_scale, batch_size=5)

    loaded = Preferences(str(output), val_size=0).rows(Stage.TRAIN)
    assert [(r["prompt"], r["responses"]) for r in loaded] == [(r["prompt"], r["responses"]) for r in rows(23)]
    for row in loaded:
        raw = torch.tensor([math.nan if s is None else s for s in letters([], row["responses"])])
        counts = torch.tensor([float(len(text.split())) for text in row["responses"]])
        scores_PKN = torch.stack([(1.0 - 2.0 * raw).clamp(-2.0, 0.0), counts], 1).unsqueeze(0)
        wins_KN = torch.tensor([row["wins/short"], row["wins/words"]]).T
        torch.testing.assert_close(wins_KN, bradley_terry_wins(scores_PKN, win_scale)[0], equal_nan=True)
    printed = capsys.readouterr().out
    dull = sum(any("dull" in text for text in row["responses"]) for row in rows(23))
    assert 0 < dull < 23
    assert printed.splitlines() == [
        f"short: 0 labels were there, 23 filled ({dull} of them in part), 0 left open",
        "words: 0 labels were there, 23 filled, 0 left open",
        f"23 rows in {output}",
    ]


def test_the_worked_number(tmp_path: Path) -> None:
    write_prompts(tmp_path / "in.jsonl", [{"prompt": "p", "responses": ["one two three", "one"]}])
    label(str(tmp_path / "out.jsonl"), Comparisons(str(tmp_path / "in.jsonl")), {"w": Objective(Length(2.0, 0, 9))})
    (row,) = written(tmp_path / "out.jsonl")
    up = 1 / (1 + math.exp(-1))  # 3/2 - 1/2 = 1
    assert row.keys() == {"prompt", "responses", "preferences"}
    assert row["preferences"]["w"]["wins"] == [[0.5, pytest.approx(up)], [pytest.approx(1 - up), 0.5]]


def test_a_label_without_a_comparison_stays_null(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [
        {"prompt": "p", "responses": ["dull", "good"]},
        {"prompt": "q", "responses": ["dull", "dull too", "good"]},
        {"prompt": "r", "responses": ["good", "fine"], "preferences": {"other": {"winner": 1}}},
    ]
    write_prompts(tmp_path / "in.jsonl", given)
    output = tmp_path / "out.jsonl"
    label(str(output), Comparisons(str(tmp_path / "in.jsonl")), {"l": objective(letters)})
    assert [row["preferences"]["l"] for row in written(output)] == [None, None, {"wins": [[0.5, 0.5], [0.5, 0.5]]}]
    assert capsys.readouterr().out.splitlines() == [
        "l: 0 labels were there, 1 filled, 2 left open",
        "2 rows have no label at all; to train, leave them out with --data.on_bad_row=skip",
        f"3 rows in {output}",
    ]


LABELS = [
    {"l": {"winner": 0}, "kept": {"wins": [[0.5, 0.9, None], [0.1, 0.5, None], [None, None, 0.5]]}},
    {"l": None, "kept": {"winner": 2}},
    {"kept": None},
    {"l": {"wins": [[0.5, None, None], [None, 0.5, None], [None, None, 0.5]]}},  # nobody compared
    {"l": {"wins": [[0.5, None, None], [None, 0.5, 0.3], [None, 0.7, 0.5]]}},
    None,
]


def same(one: Any, other: Any) -> None:
    """Equal to the last binary digit or two: ``datasets`` reads no nearer where rows differ in their fields."""
    matrices = [torch.tensor(math.nan if wins is None else wins, dtype=torch.float64) for wins in (one, other)]
    torch.testing.assert_close(*matrices, rtol=0.0, atol=2**-52, equal_nan=True)


def test_labels_that_are_there_stay_and_their_rows_are_not_scored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [{**row, "preferences": labels} for row, labels in zip(rows(6), LABELS, strict=True)]
    source, output, reward = tmp_path / "in.jsonl", tmp_path / "out.jsonl", Once()
    write_prompts(source, given)
    label(str(output), Comparisons(str(source)), {"l": objective(reward)}, batch_size=4)

    lacking = [1, 2, 3, 5]
    assert reward.asked == [(given[i]["prompt"], text) for i in lacking for text in given[i]["responses"]]
    for i, (row, new) in enumerate(zip(given, written(output), strict=True)):
        before, after = Candidates().read(row).wins, Candidates().read(new).wins
        assert set(after) == {*before, "l"}
        for name in before:
            if name != "l" or i not in lacking:
                same(after[name], before[name])
        assert after["l"] is not None
        assert math.isfinite(after["l"][1][2])
    assert capsys.readouterr().out.startswith("l: 2 labels were there, 4 filled, 0 left open\n")


def test_overwriting_replaces_labels_where_the_reward_has_an_opinion(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    labels = {"l": {"winner": 1}, "kept": {"winner": 1}}
    write_prompts(source, [
        {"prompt": "p", "responses": ["very good", "good"], "preferences": labels},
        {"prompt": "p", "responses": ["very good", "dull"], "preferences": labels},
    ])  # fmt: skip
    arguments = (str(output), Comparisons(str(source)), {"l": objective(letters)})
    label(*arguments, overwrite=True)
    first, second = (Candidates().read(row).wins for row in written(output))
    assert first["l"] is not None and first["l"][0][1] == pytest.approx(1 / (1 + math.exp(-5 / 4)))
    assert first["kept"] == second["kept"] == second["l"] == [[0.5, 0.0], [1.0, 0.5]]
    assert "l: 2 labels were there (1 of them replaced), 0 filled, 0 left open\n" in capsys.readouterr().out

    label(*arguments, overwrite=True)  # finished: the same lines
    assert "l: 2 labels were there (1 of them replaced), 0 filled, 0 left open\n" in capsys.readouterr().out
    with pytest.raises(ValueError, match="row 1 has another label 'l' than the data; choose another --output"):
        label(*arguments)


@pytest.mark.parametrize(
    ("form", "row", "prompt", "responses", "there"),
    [
        (ChosenRejected("h"), {"prompt": "p", "chosen": "yes", "rejected": "no"}, "p", ["yes", "no"], "h"),
        (
            ChosenRejected("h"),
            {"chosen": "\n\nHuman: Hi\n\nAssistant: yes", "rejected": "\n\nHuman: Hi\n\nAssistant: no"},
            "\n\nHuman: Hi\n\nAssistant:", [" yes", " no"], "h",
        ),
        (
            SafeRLHF("good", "h"),
            {"prompt": "p", "response_0": "yes", "response_1": "no", "better_response_id": -1, "safer_response_id": 0},
            "p", ["yes", "no"], "h",
        ),
        (
            Ratings({"h": "honesty", "n": "nothing"}),
            {"instruction": "p", "completions": [
                {"response": "yes", "annotations": {"honesty": {"Rating": "4"}, "nothing": {"Rating": "N/A"}}},
                {"response": "no", "annotations": {"honesty": {"Rating": "1"}, "nothing": {"Rating": "N/A"}}},
            ]},
            "p", ["yes", "no"], "h",
        ),
    ],
    ids=["pair", "dialogue", "safe", "ratings"],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_every_layout_becomes_ours(
    form: Any, row: dict[str, Any], prompt: str, responses: list[str], there: str, kind: str, tmp_path: Path
) -> None:
    source, output, reward = tmp_path / f"in.{kind}", tmp_path / "out.jsonl", Once()
    if kind == "parquet":
        datasets.disable_progress_bars()
        datasets.Dataset.from_list([row]).to_parquet(source)
    else:
        write_prompts(source, [row])
    label(str(output), Comparisons(str(source), form), {there: objective(reward), "new": Objective(Length())})
    (out,) = written(output)
    assert (out["prompt"], out["responses"]) == (prompt, responses)
    assert not reward.asked
    found = Candidates().read(out).wins
    assert found[there] == [[0.5, 1.0], [0.0, 0.5]]
    assert found["new"] == [[0.5, 0.5], [0.5, 0.5]]


def test_functions_get_the_other_columns_once_a_response(tmp_path: Path) -> None:
    seen: list[Any] = []

    def wishes(prompts: list[str], completions: list[str], wish: list[int], **columns: Any) -> list[float]:
        seen.append((wish, set(columns)))
        return [float(w) for w in wish]

    write_prompts(tmp_path / "in.jsonl", [{**row, "wish": i, "prompts": 1} for i, row in enumerate(rows(2))])
    label(str(tmp_path / "out.jsonl"), Comparisons(str(tmp_path / "in.jsonl")), {"w": objective(wishes)})
    assert seen == [([0, 0, 0, 1, 1, 1], set())]


def test_chat_messages_are_scored_as_the_policy_reads_them(tmp_path: Path) -> None:
    source, output, reward = tmp_path / "in.jsonl", tmp_path / "out.jsonl", Once()
    messages = [{"role": "user", "content": "good"}]
    write_prompts(source, [{"prompt": messages, "responses": ["fine", "bad"]}])
    tokenizer = tiny.tokenizer()
    tokenizer.save_pretrained(tmp_path / "plain")
    message = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    tokenizer.chat_template = message + "{% if add_generation_prompt %}<answer>{% endif %}"
    tokenizer.save_pretrained(tmp_path / "chat")
    arguments = (str(output), Comparisons(str(source)), {"l": objective(reward)})

    with pytest.raises(ValueError, match="line 1: the prompt is chat messages; set --tokenizer to the folder"):
        label(*arguments)
    with pytest.raises(ValueError, match=r"tokenizer '.*plain' has no chat template"):
        label(*arguments, tokenizer=str(tmp_path / "plain"))
    label(*arguments, tokenizer=str(tmp_path / "chat"))
    assert reward.asked == [("<user>good<answer>", "fine"), ("<user>good<answer>", "bad")]
    assert written(output)[0]["prompt"] == messages


def test_rewards_that_read_labels_fill_none(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="objective 'h': FromLabels reads labels that are there already; leave it out"):
        label(str(tmp_path / "out.jsonl"), Comparisons(str(data)), {"h": Objective(FromLabels("h"))})


# Going on.


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Data, and what a run without interruption writes."""
    folder = tmp_path_factory.mktemp("whole")
    write_prompts(folder / "data.jsonl", rows(23))
    arguments = (Comparisons(str(folder / "data.jsonl")), {"c": objective(company), "l": objective(letters)})
    label(str(folder / "whole.jsonl"), *arguments, batch_size=4)
    return folder / "data.jsonl", folder / "whole.jsonl"


def again(data: Path, output: Path, reward: Callable[..., Any] = company, **more: Any) -> None:
    objectives = {"c": objective(reward), "l": objective(letters)}
    label(str(output), Comparisons(str(data), **more), objectives, batch_size=4)


@pytest.mark.parametrize("fail_at", [1, 2, 6])
def test_after_an_error_it_goes_on_to_the_same_file(whole: tuple[Path, Path], tmp_path: Path, fail_at: int) -> None:
    data, finished = whole
    output, reward = tmp_path / "out.jsonl", Once(fail_at)
    with pytest.raises(RewardError, match="raised RuntimeError: the power went"):
        again(data, output, reward)
    assert output.read_bytes() == b"".join(finished.read_bytes().splitlines(keepends=True)[: 4 * (fail_at - 1)])
    rest = Once()
    again(data, output, rest)
    assert output.read_bytes() == finished.read_bytes()
    assert not set(reward.asked) & set(rest.asked)
    assert len(reward.asked) + len(rest.asked) == 23 * 3


def test_wherever_the_file_was_cut_the_rest_is_the_same(
    whole: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, finished = whole
    content = finished.read_bytes()
    ends = [i + 1 for i, byte in enumerate(content) if byte == 10]
    inside_a_letter = content.index("é".encode()) + 1
    for cut in [0, 1, ends[4] - 1, ends[5], ends[6] + 30, ends[12] - 9, ends[-2], len(content) - 1, inside_a_letter]:
        output = tmp_path / f"{cut}.jsonl"
        output.write_bytes(content[:cut])
        capsys.readouterr()
        again(data, output)
        assert output.read_bytes() == content, cut
        kept = sum(end <= cut for end in ends)
        printed = capsys.readouterr().out.splitlines()
        assert (f"{output} holds {kept} of 23 rows; resuming from there" in printed) == (kept > 0)
        assert "c: 0 labels were there, 23 filled, 0 left open" in printed  # those of the first part count


def test_a_batch_is_in_the_file_before_the_next_one_is_scored(data: Path, tmp_path: Path) -> None:
    output, found = tmp_path / "out.jsonl", []

    def looks(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        found.append(len(written(output)))
        return [0.0 for _ in completions]

    again(data, output, looks)
    assert found == [0, 4, 8, 12, 16, 20]


def test_a_limit_can_be_raised(whole: tuple[Path, Path], tmp_path: Path) -> None:
    data, _ = whole
    again(data, tmp_path / "out.jsonl", limit=6)
    assert len(written(tmp_path / "out.jsonl")) == 6
    again(data, tmp_path / "out.jsonl", limit=99)
    assert [row["prompt"] for row in written(tmp_path / "out.jsonl")] == [f"the film {i}" for i in range(23)]
    with pytest.raises(ValueError, match="holds more rows than the 6 of"):
        again(data, tmp_path / "out.jsonl", limit=6)


def test_a_finished_file_is_left_alone(
    whole: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, finished = whole
    output, reward = tmp_path / "out.jsonl", Once()
    output.write_bytes(finished.read_bytes())
    output.chmod(0o444)
    before = output.stat().st_mtime_ns
    again(data, output, reward)
    assert (reward.calls, output.stat().st_mtime_ns) == (0, before)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == f"{output} is finished already: nothing was done"
    assert printed[1] == "c: 0 labels were there, 23 filled, 0 left open"


def change(key: str, value: Any) -> Callable[[list[bytes]], list[bytes]]:
    """The third row with another value."""

    def changed(lines: list[bytes]) -> list[bytes]:
        return [*lines[:2], json.dumps({**json.loads(lines[2]), key: value}).encode() + b"\n", *lines[3:5]]

    return changed


@pytest.mark.parametrize(
    ("alter", "says"),
    [
        (change("prompt", "the play"), "row 3 has another prompt than that of '"),
        (change("responses", ["x", "y", "z"]), "row 3 has other responses than that of '"),
        (change("preferences", {"c": None}), r"row 3 was written with other objectives \(its labels: c; now c, l\)"),
        (change("preferences", {"c": 5, "l": None}), r"row 3 cannot be read: 'preferences\.c' must hold"),
        (lambda lines: [*lines[:2], b"[1]\n"], "row 3 is not a JSON object"),
        (lambda lines: [*lines[:2], b'{"prompt"\n', *lines[2:]], "row 3 is not JSON"),
        (lambda lines: [*lines, lines[0]], "holds more rows than the 23 of '"),
        (lambda lines: [b"years of work"], "row 1 is not that of '"),
        (lambda lines: [*lines[:3], b'{"prompt": "the film 3", "responses": ["x'], "row 4 is not that of '"),
    ],
    ids=["prompt", "responses", "names", "label", "list", "broken", "more", "text", "half"],
)
def test_what_was_not_made_from_these_data_is_refused_and_kept(
    whole: tuple[Path, Path], tmp_path: Path, alter: Callable[[list[bytes]], list[bytes]], says: str
) -> None:
    data, finished = whole
    output, reward = tmp_path / "out.jsonl", Once()
    output.write_bytes(b"".join(alter(finished.read_bytes().splitlines(keepends=True))))
    before = output.read_bytes()
    with pytest.raises(ValueError, match=says) as caught:
        again(data, output, reward)
    assert str(caught.value).endswith("; choose another --output, or remove that file")
    assert (output.read_bytes(), reward.calls) == (before, 0)


def test_bad_rows_are_told_or_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    given = rows(9)
    given[2]["responses"] = ["same", "same"]
    given[7]["prompt"] = " "
    write_prompts(source, given)
    why = r"in\.jsonl' line 3: 'responses\[0\]' and 'responses\[1\]' are identical"
    with pytest.raises(ValueError, match=f"{why}; or set --data.on_bad_row=skip"):
        again(source, output)
    assert not output.exists()
    with pytest.raises(RewardError):
        again(source, output, Once(2), on_bad_row="skip")
    again(source, output, on_bad_row="skip")
    assert [row["prompt"] for row in written(output)] == [f"the film {i}" for i in (0, 1, 3, 4, 5, 6, 8)]
    told = capsys.readouterr().out.splitlines()[0]
    assert told.startswith(f"2 of 9 rows of '{source}' are left out; the first: '{source}' line 3: 'responses[0]' and")
    write_prompts(source, [given[2]])
    with pytest.raises(ValueError, match=r"none of the 1 rows of '.*' can be used; the first: "):
        again(source, output, on_bad_row="skip")
