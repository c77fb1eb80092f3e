"""Data and scores that do not fit: one line that says what to write instead."""

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
        ('{"prompt": "the", "wish": 1}\n\n["the"]\n', "'{path}', line 3 is not a JSON object; write one object a line"),
    ],
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


def test_an_exception_of_ones_own_code_keeps_its_traceback(task: Task) -> None:
    (task.folder / "own_rewards.py").write_text("def broken(prompts, completions, **columns):\n    return int('x')\n")
    config = changed(
        task, lambda s: s["model"]["objectives"]["good"]["reward"]["init_args"].update(function="own_rewards.broken")
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(task.folder)
        patch.syspath_prepend(str(task.folder))
        with pytest.raises(ValueError, match="invalid literal for int") as caught:
            moa("fit", "--config", config)
    assert any("while scoring objective 'good'" in note for note in caught.value.__notes__)
