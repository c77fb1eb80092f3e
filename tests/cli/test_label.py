"""``moa label`` as a command; what it computes is tested with its function."""

import json
import math
from pathlib import Path
from typing import Any, NoReturn

import pytest
import yaml

from tests.cli.task import Task, complaint, moa, write_prompts


def brevity(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    return [-float(len(text)) for text in completions]


def letters(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
    return [None if "dull" in text else len(text) / 4 for text in completions]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    write_prompts(path, [{"prompt": f"the film {i}", "responses": ["bad", "good" * (i + 1)]} for i in range(9)])
    return path


@pytest.fixture
def config(data: Path, tmp_path: Path) -> Path:
    def function(name: str) -> dict[str, Any]:
        return {"reward": {"class_path": "FunctionReward", "init_args": {"function": f"{__name__}.{name}"}}}

    path = tmp_path / "label.yaml"
    settings = {"data": {"path": str(data)}, "objectives": {"brief": function("brevity"), "l": function("letters")}}
    path.write_text(yaml.safe_dump(settings))
    return path


def test_from_yaml_with_flags_over_it(config: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out.jsonl"
    moa("label", "--config", config, f"--output={output}", "--objectives.brief.scale=0.5", "--win_scale=2",
        "--data.limit=7", "--batch_size=3")  # fmt: skip
    for i, line in enumerate(output.read_text().splitlines()):
        expected = 1 / (1 + math.exp((3 - 4 * (i + 1)) * 0.5 / 2))
        assert json.loads(line)["preferences"]["brief"]["wins"][0][1] == pytest.approx(expected)
    printed = capfd.readouterr()
    assert printed.out.splitlines()[0] == "brief: 0 labels were there, 7 filled, 0 left open"
    assert "labelling" in printed.err
    assert "7/7" in printed.err


def test_ctrl_c_says_how_to_go_on(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                  monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    def interrupted(*args: Any, **kwargs: Any) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr("moa_lightning.rewards.RewardPanel.score", interrupted)
    with pytest.raises(SystemExit) as stop:
        moa("label", "--config", config, "--output", tmp_path / "out.jsonl")
    assert stop.value.code == 130
    line = f"stopped; what is in {tmp_path / 'out.jsonl'} is kept, and the same command resumes from there"
    assert capsys.readouterr().err.splitlines()[-1] == line


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--data.path=date.jsonl"], "data file 'date.jsonl' does not exist"),
        (["--data.format=ChosenRejcted"], "unknown format 'ChosenRejcted'; did you mean 'ChosenRejected'?"),
        (["--data.format=ChosenRejected"], "line 1: there is no 'chosen'; the row has prompt, responses"),
        (["--data.format=ChosenRejected", "--data.format.objektive=h"], "has no field 'objektive'"),
        (["--data.on_bad_row=drop"], "'data.on_bad_row' must be one of fail, skip; got 'drop'"),
        (["--data.limit=0"], "data.limit must be at least 1 or null, got 0"),
        (["--objectives.l.reward=Lenght"], "unknown reward 'Lenght'; did you mean 'Length'?"),
        (["--objectives.l.reward.function=tests.cli.test_label.leters"], "has no 'leters'; did you mean 'letters'?"),
        (["--objectives.l.reward.function=tests.cli.task.shortness"], "needs column 'wish', which the data does not"),
        (["--objectives.l.wait=2"], "Objective has no field 'wait'; did you mean 'weight'?"),
        (["--objectives={}"], "there are no objectives; name at least one under 'objectives'"),
        (["--win_scale=0"], "win_scale must be above 0 and batch_size at least 1, got 0 and 32"),
        (["--win_scale=.nan"], "win_scale must be above 0"),
        (["--batch_size=0"], "win_scale must be above 0 and batch_size at least 1, got 1 and 0"),
        (["--accelerator=gpuu"], "accelerator: You selected an invalid accelerator name"),
        (["--tokenizer=./nowhere"], "folder './nowhere' does not exist"),
        (["--output=out.json"], "output must be a .jsonl file, got 'out.json'"),
        (["--outputs=out.jsonl"], "unknown option '--outputs=out.jsonl'; did you mean '--output'?"),
    ],
)  # fmt: skip
def test_mistakes(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    flags: list[str], says: str,
) -> None:  # fmt: skip
    monkeypatch.setattr("moa_lightning.rewards.RewardPanel.setup", lambda *args: pytest.fail("a model was loaded"))
    output = tmp_path / "out.jsonl"
    assert says in complaint(capsys, "label", "--config", config, f"--output={output}", *flags)
    assert not output.exists()


def test_what_the_output_cannot_be(
    config: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = data.read_bytes()
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "link.jsonl").symlink_to(data)
    (tmp_path / "hard.jsonl").hardlink_to(data)
    for output, says in [
        (data, "is the data itself, which is never changed; give another file"),
        (tmp_path / "folder.jsonl" / ".." / data.name, "is the data itself"),
        (tmp_path / "link.jsonl", "is the data itself"),
        (tmp_path / "hard.jsonl", "is the data itself"),
        (tmp_path / "folder.jsonl", "is a folder; give a .jsonl file"),
        (data / "out.jsonl", "cannot be written: "),
    ]:
        assert says in complaint(capsys, "label", "--config", config, "--output", output)
    assert data.read_bytes() == before
    assert "output is missing" in complaint(capsys, "label", "--config", config)


def test_mopo_trains_on_what_it_writes(task: Task, tmp_path: Path) -> None:
    texts = ["good and fine", "bad", "dull plot"]
    write_prompts(tmp_path / "in.jsonl", [{"prompt": "the film was", "responses": texts[i % 2 :]} for i in range(8)])
    output = tmp_path / "labelled.jsonl"
    good = "{reward: {class_path: FunctionReward, init_args: {function: tests.cli.test_label.brevity}}}"
    wishes = f"--objectives={{good: {good}, short: {{reward: Length, scale: -1}}}}"
    moa("label", "--data.path", tmp_path / "in.jsonl", "--output", output, wishes)
    settings = task.settings()
    settings["data"] = {"class_path": "Preferences", "init_args": {"path": str(output), "val_size": 2, "batch_size": 3}}
    judged = {n: {"reward": {"class_path": "FromLabels", "init_args": {"label": n}}} for n in ("good", "short")}
    settings["model"] |= {
        "objectives": judged,
        "source": {"class_path": "PreferenceRows", "init_args": {"max_response_length": 8}},
        "combiner": {"class_path": "MOPO", "init_args": {"thresholds": {"short": 0.4}}},
        "loss": {"class_path": "WeightedLikelihood"},
    }
    path = tmp_path / "mopo.yaml"
    path.write_text(yaml.safe_dump(settings))
    moa("fit", "--config", path)
    assert json.loads((task.root / "summary.json").read_text())["combiner"] == "MOPO"
