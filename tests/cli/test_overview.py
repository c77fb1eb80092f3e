"""What ``moa`` says about itself, and the installed script."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

from moa_lightning.cli import COMMANDS
from tests.cli.task import Task, complaint, moa

SCRIPT = Path(sys.executable).with_name("moa")
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_the_overview_is_short_and_names_every_command(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    moa(*arguments)
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) < 20
    for command, what in COMMANDS.items():
        assert f"  {command}" in printed.out
        assert what in printed.out
    assert not printed.err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    moa("--version")
    assert capsys.readouterr().out == f"moa {importlib.metadata.version('moa-lightning')}\n"


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_help_of_a_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        moa(command, "--help")
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    named = {
        "sft": "--data.path",
        "reward": "--output",
        "label": "--objectives",
        "compare": "--runs",
        "combiners": "--name",
    }
    expected = (named | {"export": "--merge", "demo": "--steps"}).get(command, "--model.combiner")
    assert expected in printed


@pytest.mark.parametrize("given", ["fti", "--foo", "Fit"])
def test_what_is_no_command(given: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = complaint(capsys, given)
    assert line == f"the first argument must be a command, one of {', '.join(COMMANDS)}; got '{given}'"


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_the_overview_waits_for_no_library(option: str) -> None:
    code = (
        f"import sys; from moa_lightning.cli import main; main(['{option}'])\n"
        "heavy = {'torch', 'lightning', 'transformers', 'jsonargparse'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_script_runs_and_is_quiet(task: Task) -> None:
    done = subprocess.run(
        [SCRIPT, "fit", f"--config={task.config}", "--trainer.max_steps=1"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (task.root / "summary.json").is_file()
    assert (done.stdout, done.stderr) == ("", "")  # the task turns the progress bar off


def test_the_script_refuses_in_one_line(task: Task) -> None:
    done = subprocess.run(
        [SCRIPT, "fit", f"--config={task.config}", "--data.prompt_column=promt"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    says = f"moa: error: '{task.prompts}' has no column 'promt'; it has prompt, wish, row; did you mean 'prompt'?\n"
    assert (done.stdout, done.stderr) == ("", says)
