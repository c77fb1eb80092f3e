"""Data and scores that do not fit: one line that says what to write instead."""

import sys
from typing import Any

import pytest

from tests.cli import task as names
from tests.cli.task import Task, changed, complaint, moa, write_prompts

REWARD = f"{names.__name__}.{{}}"


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "'{path}' is empty"),
        ("\n\n", "'{path}' is empty"),
        ('{"prompt": "the", "wish": 1}\n{"prompt": \n', "'{path}', line 2 is not JSON: Expecting value at column 1"),
        ('{"prompt": "a", "x": ' + "[" * 3000 + "]" * 3000 + "}", "'{path}', line 1 is nested too deeply to be data"),
        ('{"prompt": "a", "wish": ' + "1" * 400 + "}\n", "'{path}', line 1 holds a number that is too large (1111"),
        ('{"prompt": "a", "wish": 1e999}\n', "'{path}', line 1 holds a number that is too large (1e999...)"),
        ('{"prompt": "the", "wish": 1}\n\n["the"]\n', "'{path}', line 3 is not a JSON object; write one object a line"),
    ],
    ids=lambda text: str(text)[:40],
)
def test_data_files(task: Task, capsys: pytest.CaptureFixture[str], content: str, says: str) -> None:
    path = task.folder / "data.jsonl"
    path.write_text(content)
    assert complaint(capsys, "fit", "--config", task.config, f"--data.path={path}").startswith(says.format(path=path))
    assert not task.root.exists()


@pytest.mark.usefixtures("no_weights")
def test_a_data_file_that_is_not_there(task: Task, capsys: pytest.CaptureFixture[str]) -> None:
    line = complaint(capsys, "fit", "--config", task.config, f"--data.path={task.folder / 'prompt.jsonl'}")
    assert line.endswith(f"does not exist; did you mean '{task.prompts}'?")


@pytest.mark.usefixtures("no_weights")
def test_a_column_that_a_reward_needs(task: Task, capsys: pytest.CaptureFixture[str]) -> None:
    write_prompts(task.prompts, [{"prompt": "the film", "wishes": 3}] * 12)
    line = complaint(capsys, "fit", "--config", task.config)
    function = REWARD.format("shortness")
    says = (
        f"objective 'short': function '{function}' needs column 'wish', which the data does not have; columns: wishes"
    )
    assert line == says


@pytest.mark.usefixtures("no_weights")
def test_a_prompt_longer_than_the_context(task: Task, capsys: pytest.CaptureFixture[str]) -> None:
    long = task.folder / "long.jsonl"
    write_prompts(
        long, [{"prompt": "the film was", "wish": 3, "row": 1}, {"prompt": "dull " * 40, "wish": 1, "row": 2}]
    )
    line = complaint(capsys, "fit", "--config", task.config, f"--data.val_path={long}")
    assert line.startswith(
        "validate row 2: the prompt has 40 tokens; with max_new_tokens 6 it exceeds the policy's con"
    )
    assert "of 32. Lower it, remove the row, or set source.max_prompt_length" in line
    assert line.endswith("It starts: 'dull dull dull dull dull dull dull dull '")


def test_a_long_prompt_is_fine_where_its_end_is_kept(task: Task) -> None:
    write_prompts(task.prompts, [{"prompt": "dull " * 40, "wish": 1}] * 12)
    moa("fit", "--config", task.config, "--model.source.max_prompt_length=8", "--trainer.max_steps=1")


def test_a_reward_of_the_wrong_length(task: Task, capsys: pytest.CaptureFixture[str]) -> None:
    function = REWARD.format("one_too_few")
    line = complaint(capsys, "fit", "--config", task.config, f"--model.objectives.good.reward.function={function}")
    assert line == (
        f"objective 'good': function '{function}' returned 3 scores for 4 completions; "
        "return one per completion, None where it has no opinion"
    )


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("return int('x')", "raised ValueError: invalid literal for int() with base 10: 'x'"),
        ("raise SystemExit(0)", "raised SystemExit: 0"),
        ("yield 1 / 0", "raised ZeroDivisionError: division by zero"),
    ],
)
def test_an_exception_of_a_reward_is_named_and_keeps_its_traceback(
    task: Task, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, body: str, says: str
) -> None:
    (task.folder / "own_rewards.py").write_text(f"def broken(prompts, completions, **columns):\n    {body}\n")
    config = changed(
        task, lambda s: s["model"]["objectives"]["good"]["reward"]["init_args"].update(function="own_rewards.broken")
    )
    monkeypatch.chdir(task.folder)
    monkeypatch.syspath_prepend(str(task.folder))
    monkeypatch.delitem(sys.modules, "own_rewards", raising=False)
    with pytest.raises(SystemExit) as stop:
        moa("fit", "--config", config)
    assert stop.value.code == 2
    line, *rest = capsys.readouterr().err.splitlines()[-200:]
    text = "\n".join([line, *rest])
    assert f"moa: error: objective 'good': function 'own_rewards.broken' {says}\nTraceback" in text
    assert body in text, "the reward's own line"


@pytest.mark.filterwarnings("ignore:objective 'short' did not score", "ignore:no response was scored by short")
def test_an_objective_that_never_scores(task: Task, capsys: pytest.CaptureFixture[str]) -> None:
    function = f"--model.objectives.short.reward.function={__name__}.silent"
    flags = ("--config", task.config, function, "--trainer.max_steps=3", "--trainer.val_check_interval=3")
    line = complaint(capsys, "fit", *flags, "--model.silent_batches=2")
    assert line.startswith("objective short scored none of the responses of the first 2 batches")
    moa("fit", *flags, "--model.silent_batches=0", f"--trainer.default_root_dir={task.folder / 'other'}")


def silent(prompts: list[str], completions: list[str], **columns: Any) -> list[None]:
    return [None for _ in completions]
