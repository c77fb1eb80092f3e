"""A run writes into its own folder alone: not over somebody's files, and not beside another run."""

import json
import os
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from moa_lightning.run_lock import NAME, Holder
from tests.cli.task import Task, complaint, moa


def somebodys(folder: Path) -> dict[str, str]:
    (folder / "policy").mkdir(parents=True)
    for name in ("metrics.csv", "config.yaml", "policy/notes.txt"):
        (folder / name).write_text(f"my {name}\n")
    return {name: (folder / name).read_text() for name in ("metrics.csv", "config.yaml", "policy/notes.txt")}


@pytest.mark.parametrize("root", [".", "mine"])
def test_somebodys_own_files_are_left_alone(
    task: Task, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, no_weights: None, root: str
) -> None:
    cwd = task.folder / "cwd"
    before = somebodys(cwd / root)
    monkeypatch.chdir(cwd)
    start = ("fit", "--config", task.config, f"--trainer.default_root_dir={root}")
    assert complaint(capsys, *start, "--ckpt_path=last").startswith(
        f"'{root}' holds config.yaml, metrics.csv, policy, which no run wrote (there is no config.yaml of moa fit)"
    )
    assert {name: (cwd / root / name).read_text() for name in before} == before


def test_a_folder_without_a_name(
    task: Task, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, no_weights: None
) -> None:
    monkeypatch.chdir(task.folder)  # there are files in it
    for root, named in ((".", "runs/first"), ("/", "/runs/first"), ("..", "../runs/first")):
        said = complaint(capsys, "fit", "--config", task.config, f"--trainer.default_root_dir={root}")
        assert said.startswith(f"trainer.default_root_dir '{root}' is no folder for a run: there are files in it; name")
        assert said.endswith(named)
    said = complaint(capsys, "fit", "--config", task.config, f"--trainer.default_root_dir={task.config}")
    assert said == f"trainer.default_root_dir '{task.config}' is a file; name a folder"


def test_two_starts_do_not_share_a_folder(
    task: Task, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    task.root.mkdir(parents=True)
    lock = task.root / NAME
    other = Holder("elsewhere", 12)
    start = ("fit", "--config", task.config, "--trainer.max_steps=1")
    refused = f"process 12 on host elsewhere runs in {task.root} already; wait for its end, or give another"

    lock.write_text(json.dumps(asdict(other)))
    assert complaint(capsys, *start, "--ckpt_path=last").startswith(refused)
    with monkeypatch.context() as patch:  # the other one began after this one had looked
        patch.setattr("moa_lightning.commands.lightning.refuse_if_held", lambda folder: None)
        assert complaint(capsys, *start, "--ckpt_path=last").startswith(refused)
    assert {path.name for path in task.root.iterdir()} == {NAME}

    os.utime(lock, (time.time() - 300,) * 2)  # it is gone
    moa(*start, "--ckpt_path=last")
    assert not lock.exists()
    assert (task.root / "config.yaml").exists()

    lock.write_text(json.dumps(asdict(other)))
    moa(*start)  # without --ckpt_path it gets a folder of its own
    assert (task.root.with_name("run-2") / "summary.json").exists()
