"""What ``moa`` says about itself, and the installed script."""

import importlib.metadata
import re
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
    for name, command in COMMANDS.items():
        assert f"  {name}" in printed.out
        assert command.summary in printed.out
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
    first = printed.splitlines()[:3]
    assert first == [f"usage: moa {command} [options]", f"example: moa {command} {COMMANDS[command].example}", ""]
    options = re.findall(r"--([\w.]+)=", COMMANDS[command].example)
    assert [option for option in options if f"--{option} " not in printed] == []
    expected = (named | {"export": "--merge", "demo": "--steps"}).get(command, "--model.combiner")
    assert expected in printed


@pytest.mark.parametrize("given", ["fti", "--foo", "Fit"])
def test_what_is_no_command(given: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = complaint(capsys, given)
    assert line == f"the first argument must be a command, one of {', '.join(COMMANDS)}; got '{given}'"


DATA = {"datasets", "pyarrow", "pandas"}
SOLVERS = {"scipy", "torchjd", "cvxpy"}
MODELS = {"transformers", "accelerate", "peft", "wandb"}
LATE = DATA | SOLVERS | MODELS | {"matplotlib"}  # imported by what uses them, once it is used


@pytest.mark.parametrize(
    ("arguments", "unused"),
    [
        (["--help"], LATE | {"torch", "lightning", "jsonargparse"}),
        (["--version"], LATE | {"torch", "lightning", "jsonargparse"}),
        (["combiners"], LATE | {"lightning", "torchmetrics", "jinja2"}),
        (["compare", "--help"], LATE | {"torch", "lightning", "torchmetrics"}),
        (["fit", "--help"], LATE),
        # Lightning brings scipy, transformers and matplotlib by way of torchmetrics; what it does not bring waits.
        (
            ["fit", "--config=configs/demo.yaml", "--print_config"],
            DATA | {"torchjd", "cvxpy", "accelerate", "peft", "wandb"},
        ),
    ],
    ids=["--help", "--version", "combiners", "compare --help", "fit --help", "fit --print_config"],
)
def test_a_command_imports_only_what_it_uses(arguments: list[str], unused: set[str]) -> None:
    code = (
        "import sys\nfrom moa_lightning.cli import main\n"
        f"try:\n    main({arguments})\nexcept SystemExit:\n    pass\n"
        f"found = set({sorted(unused)}) & sys.modules.keys()\n"
        "assert not found, found"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_a_help_text_leaves_the_libraries_importable() -> None:
    code = (
        "from moa_lightning.cli import main\ntry:\n    main(['fit', '--help'])\nexcept SystemExit:\n    pass\n"
        "import matplotlib.pyplot, scipy.signal, transformers, importlib.metadata\n"
        "assert importlib.metadata.version('scipy') == scipy.__version__"
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
