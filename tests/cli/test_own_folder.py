"""A run writes into its own folder alone: not over somebody's files, and not beside another run."""

import json
import os
import shutil
import time
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path

import pytest
import torch
import yaml

from moa_lightning.commands.fit.cli import AlignmentCLI
from moa_lightning.commands.start_folder import refuse_other_run
from moa_lightning.errors import UserError
from moa_lightning.training.checkpoints import AtomicCheckpointIO, by_steps, newest_valid
from moa_lightning.training.run_lock import NAME, Holder, RunLock
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
    refused = f"process 12 on host elsewhere runs in {task.root} already; wait for its end, or set another"

    lock.write_text(json.dumps(asdict(other)))
    assert complaint(capsys, *start, "--ckpt_path=last").startswith(refused)
    with monkeypatch.context() as patch:  # the other one began after this one had looked
        patch.setattr("moa_lightning.commands.fit.cli.refuse_if_held", lambda folder: None)
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
    monkeypatch.setattr("moa_lightning.training.checkpoints._files_of", lambda folder: [gone, folder / "last.ckpt"])
    assert by_steps(folder) == [folder / "last.ckpt"]
    monkeypatch.setattr("moa_lightning.training.checkpoints.steps_of", lambda path: 9 if path == gone else 1)
    with monkeypatch.context() as patch:
        patch.setattr(
            "moa_lightning.training.checkpoints.by_steps", lambda folder, before: [gone, folder / "last.ckpt"]
        )
        with pytest.warns(UserWarning, match=r"step-0.ckpt is left out: there is no such file \(a run in progress"):
            assert newest_valid(folder) == folder / "last.ckpt"
    with pytest.raises(UserError, match=r"step-0.ckpt cannot be used: there is no such file .* is .*last.ckpt"):
        AtomicCheckpointIO().load_checkpoint(gone)


def test_a_checkpoint_from_elsewhere_does_not_replace_another_run(
    task: Task, capsys: pytest.CaptureFixture[str]
) -> None:
    here, other, copies = task.root, task.root.with_name("other"), task.folder / "copies"
    for root in (here, other):
        moa("fit", "--config", task.config, f"--trainer.default_root_dir={root}", "--trainer.max_steps=1")
    copies.mkdir()
    theirs = shutil.copy(other / "checkpoints" / "last.ckpt", copies / "theirs.ckpt")
    mine = shutil.copy(here / "checkpoints" / "last.ckpt", copies / "mine.ckpt")
    before = contents(task.folder / "runs")
    fit = ("fit", "--config", task.config, "--trainer.max_steps=2")

    assert complaint(capsys, *fit, f"--ckpt_path={theirs}") == (
        f"ckpt_path: {theirs} lies in no run's folder and was written by the run in '{other}', and '{here}' holds a "
        "run, which would be written over: give a new folder with --trainer.default_root_dir, or, if the checkpoint is "
        f"of the run there, move it to {here}/checkpoints"
    )
    for name, of in ((other, " of the run in it (ckpt_path: last finds the newest)"), (copies, "")):
        assert complaint(capsys, *fit, f"--ckpt_path={name}") == (
            f"ckpt_path: '{name}' is a folder and no checkpoint; name a checkpoint{of}"
        )
    assert contents(task.folder / "runs") == before

    new = task.root.with_name("new")
    moa(*fit, f"--ckpt_path={theirs}", f"--trainer.default_root_dir={new}")
    assert json.loads((new / "summary.json").read_text())["steps"] == 2
    assert {f"other/{name}": digest for name, digest in contents(other).items()}.items() <= before.items()
    moa(*fit, f"--ckpt_path={mine}")  # a copy of the run's own
    assert json.loads((here / "summary.json").read_text())["steps"] == 2
    capsys.readouterr()
    moa(*fit, f"--ckpt_path={other}/checkpoints/last.ckpt")
    assert (
        f"resumed: in {other}, the folder of the checkpoint's run; trainer.default_root_dir {here} is not used\n"
    ) in capsys.readouterr().out


def run_folder(root: Path, named: str, dirpath: str | None = None) -> Path:
    """The record of a run that was called with this folder."""
    root.mkdir(parents=True)
    settings = {
        "trainer": {"default_root_dir": named},
        "checkpoint": {"dirpath": dirpath},
        "model": {"objectives": {}},
    }
    (root / "config.yaml").write_text("# lightning.pytorch==2.6\n" + yaml.safe_dump(settings))
    return root


def checkpoint_of(path: Path, settings: dict[str, object], sharded: bool) -> Path:
    if sharded:
        path.mkdir(parents=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"global_step": 1, "moa": {"settings": settings}}, path / "meta.pt" if sharded else path)
    return path


@pytest.mark.parametrize("sharded", [False, True])
def test_which_run_a_checkpoint_outside_of_run_folders_is_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sharded: bool
) -> None:
    def names(root: str) -> dict[str, object]:
        return {"trainer": {"default_root_dir": root}}

    root = run_folder(tmp_path / "run", "runs/run")  # as it was called, from another working directory
    copies = tmp_path / "copies"
    refuse_other_run(checkpoint_of(copies / "of-this.ckpt", names(str(root)), sharded), root)
    refuse_other_run(checkpoint_of(root / "checkpoints" / "a.ckpt", names("runs/run"), sharded), root)
    kept = tmp_path / "kept"
    elsewhere = run_folder(tmp_path / "elsewhere", str(tmp_path / "elsewhere"), str(kept))
    refuse_other_run(checkpoint_of(kept / "a.ckpt", {}, sharded), elsewhere)
    refuse_other_run(copies / "of-this.ckpt", tmp_path / "new")
    for name, settings, of in (
        ("relative", names("runs/run"), "was written by the run in 'runs/run'"),  # there are many of that name
        ("other", names(str(tmp_path / "other")), f"was written by the run in '{tmp_path}/other'"),
        ("old", {}, "does not name its run"),
    ):
        monkeypatch.chdir(tmp_path)
        path = checkpoint_of(copies / f"{name}.ckpt", settings, sharded)
        with pytest.raises(UserError, match=rf"{path} lies in no run's folder and {of}, and '{root}' holds a run"):
            refuse_other_run(path, root)


def test_why_a_run_goes_to_another_folder(
    task: Task, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AlignmentCLI, "_run_subcommand", lambda self, subcommand: None)
    monkeypatch.setattr(AlignmentCLI, "instantiate_classes", lambda self: None)
    task.root.mkdir(parents=True)
    (task.root / "notes.txt").touch()
    for why in ("is not empty", "holds a run already"):
        moa("fit", "--config", task.config)
        assert f"{task.root} {why}; this one goes to {task.root}-2\n" in capsys.readouterr().out
        if why == "is not empty":
            shutil.rmtree(task.root)
            run_folder(task.root, str(task.root))
