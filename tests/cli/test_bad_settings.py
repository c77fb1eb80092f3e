"""Settings that have the right type and no sense: one line before anything is loaded or written."""

import csv
import importlib
import json
import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonargparse import Namespace
from transformers import AutoConfig

from moa_lightning.commands.errors import check_config_files
from moa_lightning.commands.fit.settings import arguments_of, check_nulls, check_settings
from moa_lightning.errors import UserError
from moa_lightning.models import LoRA
from moa_lightning.module import AlignmentModule
from tests.cli.task import Task, changed, complaint, moa

FLAGS = {
    "--trainer.val_check_interval=0": "trainer.val_check_interval must be a number of batches, at least 1, or a share",
    "--trainer.accumulate_grad_batches=0": "trainer.accumulate_grad_batches must be at least 1, got 0",
    "--model.optimizer.lr=-1": "model.optimizer.lr must be at least 0, got -1",
    "--trainer.accelerator=tpu": "trainer: ",
    "--trainer.devices=-3": "trainer: ",
    "--model.value_learning_rate=.nan": "model.value_learning_rate is NaN; give a number",
    "--model.source.temperature=null": "model.source.temperature must not be null; give a value, or leave it out for",
    "--model.optimizer.lr=nan": "'model.optimizer.lr' must be float; got 'nan'",
    "--model.lr_scheduler.step_size=1": "write --model.lr_scheduler=NAME --model.lr_scheduler.step_size=1; known: ",
    "--model.objectives.good.scale=nan": "'model.objectives.good.scale' must be float; got 'nan'",
    "--model.policy.chat_template={% if %}": "the chat template is not Jinja: ",
    "--model.policy.path={file}": "is a file; give the folder",
}


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("flag", FLAGS)
def test_flags(flag: str, task: Task, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--config", task.config, flag.replace("{file}", str(task.config))]
    assert FLAGS[flag] in complaint(capsys, "fit", *flags)
    assert not task.root.exists(), "a run that did not start left a folder"


@pytest.mark.usefixtures("no_weights")
def test_an_objective_of_a_config_is_named(task: Task, capsys: pytest.CaptureFixture[str]) -> None:
    config = changed(task, lambda s: s["model"]["objectives"]["short"].update(shift="x"))
    assert "'model.objectives.short.shift' must be float; got 'x'" in complaint(capsys, "fit", "--config", config)
    both = ["--config", config, "--model.objectives.good.shift=x"]
    assert "'model.objectives.shift' must be float" in complaint(capsys, "fit", *both), "it may be either"


def test_a_share_of_an_epoch_between_evaluations(task: Task) -> None:
    """Two batches an epoch, and an evaluation after each epoch; ours counts batches over the whole run otherwise."""
    moa("fit", "--config", task.config, "--trainer.val_check_interval=1.0", "--trainer.max_steps=4")
    with (task.root / "front.csv").open(newline="") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["0", "2", "4"]
    assert yaml.safe_load((task.root / "config.yaml").read_text())["trainer"]["check_val_every_n_epoch"] == 1


def test_an_adapter_that_saves_layers_the_model_lacks(task: Task, capsys: pytest.CaptureFixture[str]) -> None:
    line = complaint(capsys, "fit", "--config", task.config, "--model.policy.lora={r: 2, modules_to_save: [lm_haed]}")
    assert "policy.lora.modules_to_save: " in line
    assert "has no layer 'lm_haed'; did you mean 'lm_head'?" in line
    assert not task.root.exists()


@pytest.mark.usefixtures("no_weights")
def test_a_config_of_a_model_without_layers(task: Task, capsys: pytest.CaptureFixture[str]) -> None:
    file = task.policy / "config.json"
    config = AutoConfig.from_pretrained(task.policy)
    name = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    file.write_text(json.dumps({**json.loads(file.read_text()), name: -1}))
    assert f"has {name} -1; it must be at least 1" in complaint(capsys, "fit", "--config", task.config)


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
        ("model.objectives", [{"good": Namespace(**v)} for v in (
            {"scale": 0}, {"scale": float("inf")}, {"shift": float("inf")}, {"clip": [1, 0]}, {"weight": -1})],
         [{"good": Namespace(scale=-1, shift=0, clip=None, weight=0)}, {"good": Namespace(clip=[0, 1])}]),
        ("trainer.default_root_dir", [None], ["runs/run"]),
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
    ("class_path", "field", "default"),
    [
        ("moa_lightning.sources.Rollout", "temperature", " 1.0"),
        ("moa_lightning.sources.Rollout", "advantages", ""),
        ("moa_lightning.data.Prompts", "batch_size", " 64"),
        ("torch.optim.AdamW", "lr", " 0.001"),
    ],
)
def test_nulls_of_classes(class_path: str, field: str, default: str) -> None:
    given = Namespace(class_path=class_path, init_args=nested(field, None))
    line = rf"^it\.{field} must not be null; give a value, or leave it out for its default{default}$"
    with pytest.raises(UserError, match=line):
        check_nulls(given, Any, "it")
    check_nulls(Namespace(class_path=class_path, init_args=Namespace()), Any, "it")


@pytest.mark.parametrize("package", ["combiners", "losses", "rewards", "sources"])
def test_the_types_of_every_class_that_a_config_names_are_known(package: str) -> None:
    """A type that only type checkers import must not hide the others."""
    module = importlib.import_module(f"moa_lightning.{package}")
    classes = [c for name in module.__all__ if isinstance(c := getattr(module, name), type) and is_dataclass(c)]
    assert classes
    for one in classes:
        fields_of_init = {field.name for field in fields(one) if field.init}
        known = set(arguments_of(one))
        assert known == fields_of_init - ({"weighting"} if one.__name__ == "Gramian" else set()), one


def test_nulls_where_they_are_values_and_where_not() -> None:
    rollout = Namespace(class_path="moa_lightning.sources.Rollout", init_args=nested("missing_eos_penalty", None))
    good = Namespace(reward=Namespace(class_path="moa_lightning.rewards.Length", init_args=Namespace()), clip=None)
    model = Namespace(combiner=None, source=rollout, policy=Namespace(path="p", lora=None), objectives={"good": good})
    check_nulls(model, AlignmentModule, "model")
    good.scale = None
    with pytest.raises(UserError, match=r"^model\.objectives\.good\.scale must not be null"):
        check_nulls(model, AlignmentModule, "model")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"use_dra": True}, "peft.LoraConfig has no field 'use_dra'; did you mean 'use_dora'?"),
        ({"task_type": "SEQ_CLS"}, "policy.lora.options holds 'task_type', which is always CAUSAL_LM here; remove it"),
        ({"r": 3}, "policy.lora.options holds 'r', which is set elsewhere; use policy.lora.r"),
    ],
)
def test_options_of_an_adapter(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=re.escape(says)):
        LoRA(options=options)
    LoRA(options={"use_dora": True})


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
