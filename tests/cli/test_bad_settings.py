"""Settings that have the right type and no sense: one line before anything is loaded or written."""

from pathlib import Path
from typing import Any

import pytest
from jsonargparse import Namespace

from moa_lightning.commands.errors import check_config_files
from moa_lightning.commands.fit.settings import check_settings
from moa_lightning.errors import UserError
from tests.cli.task import Task, changed, complaint

FLAGS = {
    "--trainer.val_check_interval=0": "trainer.val_check_interval must be a number of batches, at least 1, or a share",
    "--trainer.accumulate_grad_batches=0": "trainer.accumulate_grad_batches must be at least 1, got 0",
    "--model.optimizer.lr=-1": "model.optimizer.lr must be at least 0, got -1",
    "--trainer.accelerator=tpu": "trainer: ",
    "--trainer.devices=-3": "trainer: ",
    "--model.value_learning_rate=.nan": "model.value_learning_rate is NaN; give a number",
    "--model.policy.path={file}": "is a file; give the folder",
}


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("flag", FLAGS)
def test_flags(flag: str, task: Task, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--config", task.config, flag.format(file=task.config)]
    assert FLAGS[flag] in complaint(capsys, "fit", *flags)
    assert not task.root.exists(), "a run that did not start left a folder"


def nested(name: str, value: Any) -> Namespace:
    config = Namespace()
    config[name] = value
    return config


@pytest.mark.parametrize(
    ("name", "bad", "good"),
    [
        ("trainer.val_check_interval", [0, -1, 1.5, float("nan")], [1, 0.5, 1.0, 200, None]),
        ("trainer.gradient_clip_val", [-1, float("nan"), float("inf")], [0, 0.5, None]),
        ("trainer.accumulate_grad_batches", [0, -1], [1, 4]),
        ("checkpoint.save_top_k", [-5], [-1, 0, 3]),
        ("model.optimizer", [{"init_args": {"lr": v}} for v in (-1, float("nan"), float("inf"))],
         [{"init_args": {"lr": 0.0}}, {"class_path": "a.B"}]),
        ("model.source", [{"init_args": {"temperature": float("nan")}}, {"n": 10**400}], [{"cap": float("inf")}]),
    ],
)  # fmt: skip
def test_ranges(name: str, bad: list[Any], good: list[Any]) -> None:
    for value in good:
        check_settings(nested(name, value))
    for value in bad:
        with pytest.raises(UserError, match=name):
            check_settings(nested(name, value))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: " + "[" * 3000 + "]" * 3000, "is nested too deeply"),
        ("a: &a [*a]", "line 1: an alias stands for something that holds itself"),
        ("a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9)),
         "its aliases stand for more than 100000 values"),
        ("? [a, b]\n: 1", "line 1: a key must be one word"),
    ],
)  # fmt: skip
def test_yaml(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text + "\n")
    with pytest.raises(UserError, match=says):
        check_config_files([f"--config={path}"])


def test_an_alias_may_be_used_twice(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("a: &a {x: 1}\nb: *a\nc: *a\n")
    check_config_files([f"--config={path}"])


@pytest.mark.usefixtures("no_weights")
def test_an_unknown_setting_at_the_top(task: Task, capsys: pytest.CaptureFixture[str]) -> None:
    line = complaint(capsys, "fit", "--config", changed(task, lambda s: s.update(trainr={"max_steps": 1})))
    assert "trainr" in line
    assert "did you mean" in line
