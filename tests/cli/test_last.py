"""``last.ckpt`` is the last one, and one rule says which checkpoint is the newest, wherever a run lies."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer

from moa_lightning.commands.fit.run_config import RunConfig
from moa_lightning.training.checkpoints import by_steps, newest_valid, steps_of
from moa_lightning.training.run_checkpoint import RunCheckpoint
from tests.cli.task import Task, complaint, moa
from tests.cli.test_told import interrupt_at


def files(folder: Path) -> dict[str, int | None]:
    return {path.name: steps_of(path) for path in folder.iterdir()}


def test_another_spelling_and_a_move_leave_one_last(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(task.folder)
    moa("fit", "--config", task.config, "--trainer.default_root_dir=runs/run", "--trainer.max_steps=1")
    checkpoints = task.folder / "runs" / "run" / "checkpoints"
    assert files(checkpoints) == {"last.ckpt": 1, "step-1.ckpt": 1}
    moa("fit", "--config", task.config, f"--ckpt_path={checkpoints / 'last.ckpt'}", "--trainer.max_steps=2")
    assert files(checkpoints) == {"last.ckpt": 2, "step-2.ckpt": 2}

    moved = task.folder / "moved"
    (task.folder / "runs" / "run").rename(moved)
    elsewhere = task.folder / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)  # from where the recorded folder is not found
    moa("fit", "--config", "../moved/config.yaml", "--ckpt_path=last", "--trainer.max_steps=3")
    assert files(moved / "checkpoints") == {"last.ckpt": 3, "step-3.ckpt": 3}
    assert not any((task.folder / "runs").iterdir())
    assert not any(elsewhere.iterdir())


def test_checkpoints_elsewhere(task: Task, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    kept = task.folder / "kept"
    there = f"--checkpoint.dirpath={kept}"
    with monkeypatch.context() as patch:
        interrupt_at(2, patch)
        with pytest.raises(SystemExit):
            moa("fit", "--config", task.config, there, "--trainer.max_steps=3", "--run_files.save_policy=false")
    told = capsys.readouterr().err
    assert f"the last checkpoint is of step 1; resume with: moa fit --config {task.root}/config.yaml" in told
    assert f"--ckpt_path={kept}/last.ckpt" in told
    refused = complaint(capsys, "fit", "--config", task.config, there, "--trainer.default_root_dir=runs/new")
    assert refused.startswith(
        f"checkpoint.dirpath {kept} holds checkpoints of another run; give another one, or resume"
    )
    moa("export", task.root, task.folder / "out")
    assert "This is its newest checkpoint, last.ckpt" in capsys.readouterr().out
    moa("fit", "--config", task.root / "config.yaml", "--ckpt_path=last")
    assert files(kept) == {"last.ckpt": 3, "step-3.ckpt": 3}


def test_a_kill_between_two_files_of_a_step(
    task: Task, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """``last.ckpt`` is of the step before."""
    with monkeypatch.context() as patch:
        interrupt_at(3, patch)
        last = RunCheckpoint._save_last_checkpoint
        patch.setattr(
            RunCheckpoint,
            "_save_last_checkpoint",
            lambda self, trainer, found: trainer.global_step < 2 and last(self, trainer, found),
        )
        with pytest.raises(SystemExit):
            moa("fit", "--config", task.config, "--trainer.max_steps=3")
    assert files(task.root / "checkpoints") == {"last.ckpt": 1, "step-2.ckpt": 2}
    told = capsys.readouterr().err
    assert "stopped at step 3; the last checkpoint is of step 2;" in told
    assert "--ckpt_path=" + str(task.root / "checkpoints" / "step-2.ckpt") in told
    moa("fit", "--config", task.config, "--ckpt_path=last", "--trainer.max_steps=3")
    assert f"resumes from {task.root}/checkpoints/step-2.ckpt" in capsys.readouterr().out
    assert files(task.root / "checkpoints")["last.ckpt"] == 3


def test_a_kill_between_the_two_files_of_the_last_step(task: Task) -> None:
    """The run that resumes has no step left to do, and still leaves a ``last.ckpt`` of its end."""
    moa("fit", "--config", task.config, "--trainer.max_steps=2")
    checkpoints = task.root / "checkpoints"
    end = torch.load(checkpoints / "last.ckpt", weights_only=True)
    before = {**end, "global_step": 1}
    torch.save(before, checkpoints / "last.ckpt")
    moa("fit", "--config", task.config, "--ckpt_path=last", "--trainer.max_steps=2")
    assert files(checkpoints) == {"last.ckpt": 2, "step-2.ckpt": 2}
    again = torch.load(checkpoints / "last.ckpt", weights_only=True)
    torch.testing.assert_close(again["state_dict"], end["state_dict"], rtol=0, atol=0)
    torch.testing.assert_close(again["optimizer_states"], end["optimizer_states"], rtol=0, atol=0)


class Killed(BaseException):
    """Nothing of the run's own runs after it."""


@pytest.mark.parametrize("checkpoint", [{}, {"monitor": "falling", "mode": "min"}], ids=["the newest", "the best"])
def test_a_kill_between_the_new_checkpoint_and_the_removal_of_the_old_one(
    task: Task, checkpoint: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run that resumes leaves the files of an unbroken one, and a copy that the user made."""
    settings = task.settings()
    settings["checkpoint"] = checkpoint
    settings["trainer"] |= {"callbacks": [{"class_path": f"{__name__}.Falling"}], "max_steps": 3}
    task.config.write_text(yaml.safe_dump(settings))
    checkpoints = task.root / "checkpoints"
    with monkeypatch.context() as patch:
        patch.setattr(RunCheckpoint, "_remove_checkpoint", killed)
        with pytest.raises(Killed):
            moa("fit", "--config", task.config)
    assert files(checkpoints) == {"step-1.ckpt": 1, "last.ckpt": 1, "step-2.ckpt": 2}
    shutil.copy(checkpoints / "step-1.ckpt", checkpoints / "step-1-of-mine.ckpt")
    moa("fit", "--config", task.config, "--ckpt_path=last", "--trainer.max_steps=2")  # has no step left to do
    assert files(checkpoints) == {"step-1-of-mine.ckpt": 1, "last.ckpt": 2, "step-2.ckpt": 2}
    moa("fit", "--config", task.config, "--ckpt_path=last")
    assert files(checkpoints) == {"step-1-of-mine.ckpt": 1, "last.ckpt": 3, "step-3.ckpt": 3}


def killed(*_: Any) -> None:
    raise Killed


def test_a_kill_between_the_best_checkpoint_of_the_last_step_and_the_others(
    task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = task.settings()
    settings["model"]["combiner"] = {"class_path": "Lagrangian", "init_args": {"thresholds": {"short": -9.0}}}
    settings["trainer"]["val_check_interval"] = 2
    task.config.write_text(yaml.safe_dump(settings))
    with monkeypatch.context() as patch:
        patch.setattr(RunCheckpoint, "on_validation_end", lambda self, trainer, _: trainer.global_step and killed())
        with pytest.raises(Killed):
            moa("fit", "--config", task.config)
    assert files(task.root / "checkpoints") == {"best.ckpt": 2}
    moa("fit", "--config", task.config, "--ckpt_path=last")
    assert files(task.root / "checkpoints") == {"best.ckpt": 2, "last.ckpt": 2, "step-2.ckpt": 2}


def test_a_kill_while_the_record_is_written(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same command starts again: half a ``config.yaml`` would be taken for somebody else's."""
    record = RunConfig._save

    def cut(self: RunConfig, *arguments: Any) -> None:
        def write_half(config: Any, path: str, **_: Any) -> None:
            Path(path).write_text("seed_everything: 7\n")
            killed()

        patch.setattr(self.parser, "save", write_half)
        record(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(RunConfig, "_save", cut)
        with pytest.raises(Killed):
            moa("fit", "--config", task.config, "--ckpt_path=last", "--trainer.max_steps=1")
    assert not (task.root / "config.yaml").exists()
    moa("fit", "--config", task.config, "--ckpt_path=last", "--trainer.max_steps=1")
    assert yaml.safe_load((task.root / "config.yaml").read_text())["trainer"]["max_steps"] == 1
    assert not list(task.root.glob(".config*"))


class Falling(Callback):
    """A metric that is best at the first evaluation, of step 1."""

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.log("falling", -float(trainer.global_step or 9))


BEST_OF = {"monitor": "falling", "mode": "max"}
SAVE_POINTS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "the best": (BEST_OF, {"step-1.ckpt"}),
    "a link to the best": (BEST_OF | {"save_last": "link"}, {"step-1.ckpt"}),
    "every step": (BEST_OF | {"every_n_train_steps": 1}, {"step-1.ckpt"}),
    "none": ({"save_top_k": 0}, set()),
}


@pytest.mark.parametrize(("checkpoint", "others"), SAVE_POINTS.values(), ids=SAVE_POINTS)
def test_last_follows_each_save_point(
    task: Task, checkpoint: dict[str, Any], others: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the evaluation is not among the best, of which Lightning keeps no checkpoint."""
    settings = task.settings()
    settings["checkpoint"] = checkpoint
    settings["trainer"] |= {"callbacks": [{"class_path": f"{__name__}.Falling"}], "max_steps": 3}
    task.config.write_text(yaml.safe_dump(settings))
    with monkeypatch.context() as patch:
        interrupt_at(3, patch)
        with pytest.raises(SystemExit):
            moa("fit", "--config", task.config)
    assert files(task.root / "checkpoints") == {"last.ckpt": 2} | dict.fromkeys(others, 1)
    moa("fit", "--config", task.config, "--ckpt_path=last")
    assert files(task.root / "checkpoints") == {"last.ckpt": 3} | dict.fromkeys(others, 1)


def test_the_newest_by_steps(tmp_path: Path) -> None:
    for name, step in (("last", 2), ("step-34", 34), ("best", 20)):
        torch.save({"global_step": step, "state_dict": {}}, tmp_path / f"{name}.ckpt")
    assert [path.stem for path in by_steps(tmp_path)] == ["step-34", "best", "last"]
    assert [path.stem for path in by_steps(tmp_path, before=20)] == ["last"]
    assert newest_valid(tmp_path) == tmp_path / "step-34.ckpt"
    assert by_steps(tmp_path / "nowhere") == []


def test_best_checkpoints_move_too(tmp_path: Path) -> None:
    """Of those that are gone nothing is remembered, or they would be removed a second time."""
    before, now = tmp_path / "before", tmp_path / "now"
    now.mkdir()
    for name in ("a.ckpt", "b.ckpt"):
        (now / name).touch()
    state = {
        "dirpath": str(before),
        "best_model_path": str(before / "a.ckpt"),
        "last_model_path": str(before / "last.ckpt"),
        "best_model_score": torch.tensor(1.0),
        "best_k_models": {str(before / f"{n}.ckpt"): torch.tensor(v) for n, v in (("a", 1.0), ("b", 2.0), ("c", 3.0))},
        "kth_best_model_path": str(before / "c.ckpt"),
        "kth_value": torch.tensor(3.0),
    }
    callback = RunCheckpoint(now, monitor="loss", save_top_k=3)
    callback.load_state_dict(state)
    assert callback.best_model_path == str(now / "a.ckpt")
    assert callback.last_model_path == ""
    assert callback.best_k_models == {str(now / "a.ckpt"): 1.0, str(now / "b.ckpt"): 2.0}
    assert callback.kth_best_model_path == str(now / "b.ckpt")
    assert callback.state_key.startswith("ModelCheckpoint{")


def test_a_config_that_is_no_record_means_no_folder(task: Task) -> None:
    """A user's own config.yaml, in a folder with a file of a name that a run uses."""
    own = task.folder / "config.yaml"
    own.write_text(yaml.safe_dump(task.settings()))
    (task.folder / "metrics.csv").write_text("mine\n")
    moa("fit", "--config", own, "--trainer.max_steps=1")
    assert (task.root / "config.yaml").exists()
    assert (task.folder / "metrics.csv").read_text() == "mine\n"
