"""A disk that is full or read-only, and a run folder that disappears: one line, and the run continues where it can."""

import csv
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from moa_lightning.callbacks import MetricsFile, ObjectiveMetrics, ParetoFront, RunFiles, SampleTable
from moa_lightning.training.run_checkpoint import RunCheckpoint
from moa_lightning.utils.non_finite import NonFiniteError
from tests.callbacks.scripted import Scripted, around, evaluation, experience, trainer
from tests.cli.conftest import _process_as_before, task  # noqa: F401  # fixtures
from tests.cli.task import Task, complaint


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small disk of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("a small disk can be mounted by root alone")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


TERMS = {f"term{i}": 0.5 for i in range(1200)}  # a row that does not fit into the rest of a page


def fill(folder: Path) -> Path:
    """Until nothing more goes in."""
    path = folder / "filler"
    with suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(b"x" * 4096)
    return path


class At(Callback):
    """Does something before some steps."""

    def __init__(self, **what) -> None:
        self.what = {int(step.removeprefix("step")): action for step, action in what.items()}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.what.get(trainer.global_step, lambda: None)()


def played(steps: int) -> Scripted:
    evaluations = [evaluation(around(float(i), float(i))) for i in range(steps + 1)]
    return Scripted(evaluations, collected=[experience(torch.zeros(4, 2))] * steps, terms={"clip_ratio": 0.5, **TERMS})


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_observers_warn_once_and_catch_up(disk: Path) -> None:
    root = disk / "run"
    full = At(step2=lambda: fill(disk), step4=(disk / "filler").unlink)
    watchers = [ObjectiveMetrics(), ParetoFront({"good": -9.0, "short": -9.0}), SampleTable(), RunFiles(False)]
    with pytest.warns(UserWarning, match="cannot be written: No space left on device; the run continues") as warned:
        trainer(root, *watchers, full, logger=MetricsFile(str(root)), max_steps=6, val_check_interval=2).fit(played(6))
    said = [str(w.message).partition(" cannot")[0] for w in warned if "cannot be written" in str(w.message)]
    assert len(said) == len(set(said)), said
    assert str(root / "metrics.csv") in said
    rows = table(root / "metrics.csv")
    assert [row["step"] for row in rows if row["clip_ratio"]] == [str(step) for step in range(6)], (
        "all steps, each once"
    )
    assert all(row["step"].isdigit() for row in rows)
    assert [row["step"] for row in table(root / "front.csv")] == ["0", "2", "4", "6"]


def test_a_folder_that_is_removed_is_reported(tmp_path: Path) -> None:
    root = tmp_path / "run"
    gone = At(step2=lambda: shutil.rmtree(root))
    with pytest.warns(UserWarning, match=r"metrics.csv is gone: it was removed or moved during the run"):
        trainer(root, ObjectiveMetrics(), gone, logger=MetricsFile(str(root)), max_steps=4).fit(played(4))
    steps = [row["step"] for row in table(root / "metrics.csv") if row["clip_ratio"]]
    assert steps == ["1", "2", "3"]  # step 1 waited in memory; the file has its header


def test_an_error_is_not_hidden_by_what_follows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self, *args):
        raise NonFiniteError("a second one")

    def fail():
        raise RuntimeError("the first one")

    monkeypatch.setattr(RunFiles, "_write", lambda self, *args: 1 / 0)
    monkeypatch.setattr(ModelCheckpoint, "_save_checkpoint", broken)
    saving = RunCheckpoint(tmp_path, save_on_exception=True, every_n_train_steps=100)
    with (
        pytest.warns(UserWarning, match=r"summary.json was not written: ZeroDivisionError"),
        pytest.warns(UserWarning, match="no checkpoint was written after the error: a second one"),
        pytest.raises(RuntimeError, match="the first one"),
    ):
        trainer(
            tmp_path, RunFiles(), At(step1=fail), saving, val_check_interval=4, num_sanity_val_steps=0,
            enable_checkpointing=True,
        ).fit(played(4))  # fmt: skip


def test_a_full_or_read_only_disk_is_one_line(
    task: Task,  # noqa: F811
    disk: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root = disk / "run"
    start = ("fit", "--config", task.config, "--trainer.max_steps=1", f"--trainer.default_root_dir={root}")
    filler = fill(disk)
    said = complaint(capsys, *start)
    assert said == f"the run folder '{root}' cannot be written: No space left on device; give another one, or make room"
    filler.unlink()
    assert not root.exists()
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    said = complaint(capsys, *start)
    assert said.startswith(f"trainer.default_root_dir '{root}' cannot be written: there is no permission, or the disk")
    answers = disk / "answers.jsonl"
    said = complaint(capsys, "predict", "--config", task.config, f"--predictions.path={answers}")
    assert said == f"'{answers}' cannot be written: Read-only file system; set --predictions.path to another file"
