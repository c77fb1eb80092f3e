"""Checkpoints: one command that starts and goes on, whole files only, and what is said of broken ones."""

import csv
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from moa_lightning.training.checkpoints import AtomicCheckpointIO, explained, newest_valid, problem, save_file
from tests.cli.conftest import _process_as_before, task  # noqa: F401  # fixtures
from tests.cli.task import Task, complaint, moa
from tests.helpers.processes import files_of_at_most


def policy(root: Path) -> dict[str, torch.Tensor]:
    files = (root / "policy").glob("*.safetensors")
    return {f"{path.name} {name}": value for path in files for name, value in load_file(path).items()}


def written(path: Path, step: int) -> Path:
    path.parent.mkdir(exist_ok=True)
    torch.save({"global_step": step, "state_dict": {"weight": torch.arange(5000.0)}}, path)
    return path


def damage(path: Path) -> None:
    """One byte of a tensor."""
    content = bytearray(path.read_bytes())
    at = content.find(torch.tensor([1000.0, 1001.0]).numpy().tobytes())
    assert at > 0
    content[at] ^= 1
    path.write_bytes(content)


def cut_off(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def test_one_command_starts_and_goes_on(task: Task, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    straight = task.root.with_name("straight")
    moa("fit", "--config", task.config, "--trainer.max_steps=4", f"--trainer.default_root_dir={straight}")
    task.root.mkdir(parents=True)
    (task.root / "metrics.csv").write_text("step\n1\n")  # of an attempt that was killed before its first checkpoint
    (task.root / "config.yaml").write_bytes((straight / "config.yaml").read_bytes())
    again = ("fit", "--config", task.config, "--ckpt_path=last")
    moa(*again)
    assert f"ckpt_path=last: starts in {task.root}: there is no checkpoint yet" in capsys.readouterr().out
    with (task.root / "metrics.csv").open(newline="") as file:
        assert next(csv.DictReader(file))["step"] == "0"
    moa(*again, "--trainer.max_steps=4")
    assert f"resumes from {task.root}/checkpoints/last.ckpt" in capsys.readouterr().out
    torch.testing.assert_close(policy(task.root), policy(straight), rtol=0, atol=0)
    moa(*again, "--trainer.max_steps=4")  # it is at its end: nothing more happens to it
    assert json.loads((task.root / "summary.json").read_text())["tokens_per_second"] > 0  # of before
    torch.testing.assert_close(policy(task.root), policy(straight), rtol=0, atol=0)
    assert {path.name for path in task.root.parent.iterdir()} == {"run", "straight"}

    cut_off(task.root / "checkpoints" / "last.ckpt")
    with pytest.warns(UserWarning, match=r"last.ckpt is left out: it is truncated or not a checkpoint"):
        moa("validate", "--config", task.root / "config.yaml", "--ckpt_path=last")
    assert "ckpt_path=last: loads" in capsys.readouterr().out
    last = task.root / "checkpoints" / "last.ckpt"
    found = complaint(capsys, "fit", "--config", task.root / "config.yaml", f"--ckpt_path={last}")
    assert found.startswith(f"checkpoint {last} cannot be used: it is truncated or not a checkpoint (")
    assert f"; the newest valid checkpoint in its folder is {task.root}/checkpoints/step-4.ckpt" in found
    for broken in (task.root / "checkpoints").glob("step-*.ckpt"):
        cut_off(broken)
    with pytest.warns(UserWarning, match="is left out"):
        found = complaint(capsys, *again)
    assert found.startswith(f"ckpt_path: 'last' finds no valid checkpoint in {task.root}/checkpoints, only broken ones")
    assert (task.root / "metrics.csv").exists()
    nothing = f"--trainer.default_root_dir={task.folder / 'none'}"
    found = complaint(capsys, "validate", "--config", task.config, "--ckpt_path=last", nothing)
    assert found == f"ckpt_path: 'last' finds no valid checkpoint in {task.folder / 'none/checkpoints'}; give a path"


def test_the_newest_whole_one_is_by_step(tmp_path: Path) -> None:
    newest, older, oldest = (written(tmp_path / f"{name}.ckpt", step) for name, step in (("a", 30), ("b", 9), ("c", 2)))
    assert newest_valid(tmp_path) == newest
    damage(newest)
    with pytest.warns(UserWarning, match="a.ckpt is left out: its content is damaged"):
        assert newest_valid(tmp_path) == older
    cut_off(older)
    with pytest.warns(UserWarning, match=r"(a|b).ckpt is left out"):
        assert newest_valid(tmp_path) == oldest
    torch.save([1], oldest)
    assert problem(oldest) == "it was not written by Lightning's Trainer"
    with pytest.warns(UserWarning, match="left out"):
        assert newest_valid(tmp_path) is None
    assert newest_valid(tmp_path / "nowhere") is None


def test_folders_are_removed_and_replaced_whatever_a_killed_run_left(tmp_path: Path) -> None:
    plugin = AtomicCheckpointIO()
    content = {"global_step": 3, "state_dict": {}}
    for name in ("a.ckpt", ".a.ckpt.removed", "b.ckpt"):
        written(tmp_path / name / "meta.pt", 1)
    plugin.remove_checkpoint(tmp_path / "a.ckpt")  # a run was killed in the middle of its removal
    plugin.save_checkpoint(content, tmp_path / "b.ckpt")  # a file in place of a folder
    (tmp_path / "last.ckpt").symlink_to(written(tmp_path / "c" / "meta.pt", 1).parent)
    plugin.save_checkpoint(content, tmp_path / "last.ckpt")
    assert {path.name for path in tmp_path.iterdir()} == {"b.ckpt", "c", "last.ckpt"}
    assert (tmp_path / "c" / "meta.pt").is_file()
    (tmp_path / "b.ckpt").rename(tmp_path / ".b.ckpt.former")  # killed between the two renames
    (tmp_path / "last.ckpt").unlink()
    assert newest_valid(tmp_path) == tmp_path / ".b.ckpt.former"


def test_a_full_disk_is_told_as_such(tmp_path: Path) -> None:
    content = {"global_step": 3, "state_dict": {"weight": torch.zeros(5000)}}
    with (
        files_of_at_most(2000),
        pytest.raises(ValueError, match=r"a.ckpt could not be written: File too large; it takes 0.0 MiB"),
        explained(tmp_path / "a.ckpt", 0),
    ):
        save_file(content, tmp_path / "meta.pt")
