"""A run writes into its own folder alone: not over somebody's files, and not beside another run."""

import json
import os
import shutil
import time
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path

import pytest

from moa_lightning.checkpoints import AtomicCheckpointIO, by_steps, newest_whole
from moa_lightning.errors import UserError
from moa_lightning.run_lock import NAME, Holder, RunLock
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


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_run_in_progress_is_evaluated_beside_it(task: Task, capsys: pytest.CaptureFixture[str]) -> None:
    moa("fit", "--config", task.config, "--trainer.max_steps=1")
    (task.root / NAME).write_text(json.dumps(asdict(Holder("elsewhere", 12))))
    before = contents(task.root)
    for stage in ("validate", "test"):
        capsys.readouterr()
        moa(stage, "--config", task.root / "config.yaml", "--ckpt_path=last")
        last = task.root / "checkpoints" / "last.ckpt"
        assert (
            f"the run in {task.root} is in progress (process 12 on host elsewhere): this is of step 1, from {last}, "
            f"and writes to {task.root / stage} alone\n"
        ) in capsys.readouterr().out
    after = contents(task.root)
    assert before.items() <= after.items()
    assert {name.partition("/")[0] for name in after.keys() - before.keys()} == {"validate", "test"}
    assert not list(task.root.glob("*/.lock*"))
    (task.root / NAME).unlink()
    moa("validate", "--config", task.root / "config.yaml", "--ckpt_path=last")
    assert "in progress" not in capsys.readouterr().out


def test_two_evaluations_do_not_share_a_folder(
    task: Task, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both chose the same folder; the other one was first to write there."""
    folder, acquire = task.root / "validate", RunLock.acquire
    start = ("validate", "--config", task.config)

    def late(self: RunLock) -> None:
        self.path.write_text(json.dumps(asdict(Holder("elsewhere", 12))))
        acquire(self)

    with monkeypatch.context() as patch:
        patch.setattr(RunLock, "acquire", late)
        assert complaint(capsys, *start).startswith(f"process 12 on host elsewhere runs in {folder} already;")
    shutil.rmtree(folder)

    def later(self: RunLock) -> None:  # and has ended
        (self.path.parent / "config.yaml").write_text("theirs\n")
        acquire(self)

    with monkeypatch.context() as patch:
        patch.setattr(RunLock, "acquire", later)
        assert complaint(capsys, *start) == f"another process evaluated into '{folder}' meanwhile; start again"
    assert {path.name: path.read_text() for path in folder.iterdir()} == {"config.yaml": "theirs\n"}


def test_a_checkpoint_that_a_run_replaces_meanwhile(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was there when the folder was read."""
    moa("fit", "--config", task.config, "--trainer.max_steps=1")
    folder = task.root / "checkpoints"
    gone = folder / "step-0.ckpt"
    monkeypatch.setattr("moa_lightning.checkpoints._files_of", lambda folder: [gone, folder / "last.ckpt"])
    assert by_steps(folder) == [folder / "last.ckpt"]
    monkeypatch.setattr("moa_lightning.checkpoints.steps_of", lambda path: 9 if path == gone else 1)
    with monkeypatch.context() as patch:
        patch.setattr("moa_lightning.checkpoints.by_steps", lambda folder, before: [gone, folder / "last.ckpt"])
        with pytest.warns(UserWarning, match=r"step-0.ckpt is left out: there is no such file \(a run in progress"):
            assert newest_whole(folder) == folder / "last.ckpt"
    with pytest.raises(UserError, match=r"step-0.ckpt cannot be used: there is no such file .* is .*last.ckpt"):
        AtomicCheckpointIO().load_checkpoint(gone)
