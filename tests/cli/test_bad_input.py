"""Mistakes of the user: one line that says what to write instead, exit code 2, nothing loaded, nothing left behind."""

import csv
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from inspect import isabstract
from pathlib import Path
from typing import Any

import pytest
import torch

from moa_lightning import combiners
from moa_lightning.commands.errors import explain
from tests.cli import task as names
from tests.cli.task import Task, changed, complaint, moa

REWARD = f"{names.__name__}.{{}}"
EXPORTED = {name: getattr(combiners, name) for name in combiners.__all__}
COMBINERS = ", ".join(sorted(n for n, c in EXPORTED.items() if issubclass(c, combiners.Combiner) and not isabstract(c)))


@dataclass(frozen=True)
class Flags:
    """Flags behind a good config, and what the line must say, in this order."""

    name: str
    flags: tuple[str, ...]
    says: tuple[str, ...]


FLAGS = [
    Flags("combiner", ("--model.combiner=PANA",), ("'PANA'", "did you mean 'PAMA'", COMBINERS)),
    Flags("case", ("--model.combiner=linear",), ("'linear'", "did you mean 'Linear'")),
    Flags("nothing near", ("--model.combiner=Zebra",), ("unknown combiner 'Zebra'; known: " + COMBINERS,)),
    Flags(
        "field",
        ("--model.combiner=PAMA", "--model.combiner.nooon=true"),
        ("PAMA has no field 'nooon'", "did you mean 'noon'", "granularity, noon"),
    ),
    Flags(
        "field of another combiner",
        ("--model.combiner.weights={good: 1.0, short: 1.0}",),
        ("PAMA has no field 'weights'", "granularity, noon"),
    ),
    Flags(
        "value",
        ("--model.combiner.granularity=word",),
        ("'model.combiner.granularity' must be one of token, sequence, batch; got 'word'",),
    ),
    Flags("number", ("--trainer.max_steps=many",), ("'trainer.max_steps' must be int; got 'many'",)),
    Flags("optional number", ("--data.limit=few",), ("'data.limit' must be int or null; got 'few'",)),
    Flags("flag", ("--model.combinr=PAMA",), ("'--model.combinr=PAMA'", "did you mean '--model.combiner'")),
    # Abbreviations are no flags: they would change their meaning with the next flag that is added.
    Flags("shortened flag", ("--trainer.max_step=3",), ("'--trainer.max_step=3'", "mean '--trainer.max_steps'")),
    Flags("temperature", ("--model.source.temperature=.nan",), ("model.source.temperature is NaN; give a",)),
    Flags("learning rate", ("--model.optimizer.lr=-1",), ("model.optimizer.lr must be at least 0, got -1",)),
    Flags("rank", ("--model.policy.lora.r=0",), ("policy.lora.r must be at least 1, got 0",)),
    Flags("word", ("Linear",), ("'Linear' is not expected here", "--name=value")),
    Flags("source", ("--model.source=Rolout",), ("unknown source 'Rolout'", "did you mean 'Rollout'")),
    Flags("part of a source", ("--model.source.advantages=GEA",), ("'GEA'", "did you mean 'GAE'", "GroupRelative")),
    Flags("data", ("--data=Promts",), ("unknown data 'Promts'", "did you mean 'Prompts'", "Reviews")),
    Flags("optimizer", ("--model.optimizer=AdamV",), ("unknown optimizer 'AdamV'", "did you mean 'Adam'", "AdamW")),
    Flags("optimizer's field", ("--model.optimizer.lrr=1",), ("model.optimizer", "no field 'lrr'", "'lr'")),
    Flags("adapter", ("--model.policy.lora.rank=4",), ("LoRA has no field 'rank'", "r, lora_alpha")),
    Flags("wandb", ("--wandb=on",), ("'wandb' must be one of online, offline, off; got 'on'",)),
    Flags("precision", ("--trainer.precision=17",), ("must be one of", "bf16-mixed", "or null; got '17'")),
    Flags("strategy", ("--trainer.strategy=dpp",), ("trainer: ", "strategy", "dpp")),
    Flags(
        "needs",
        (f"--model.source={names.__name__}.Silent",),
        ("PAMA needs advantages, which Silent does not provide; choose another combiner or source",),
    ),
    Flags(
        "weights",
        ("--model.combiner=Linear", "--model.combiner.weights={good: 1.0, long: 2.0}"),
        ("weights must name each trained objective once (good, short)", "unknown: long", "missing: short"),
    ),
    Flags(
        "negative weight",
        ("--model.combiner=Linear", "--model.combiner.weights={good: 1.0, short: -2.0}"),
        ("weight of objective 'short'", ">= 0", "-2"),
    ),
    Flags(
        "no class of that name",
        (f"--model.combiner={names.__name__}.Geometric",),
        (f"model.combiner: class '{names.__name__}.Geometric': '{names.__name__}' has no 'Geometric'",),
    ),
    Flags(
        "no such module",
        ("--model.combiner=my_combine.Geometric",),
        ("class 'my_combine.Geometric': there is no module 'my_combine'",),
    ),
    Flags(
        "another kind of class",
        ("--model.combiner=moa_lightning.rewards.Length",),
        ("model.combiner: 'moa_lightning.rewards.Length' is no Combiner; subclass moa_lightning.combiners.Combiner",),
    ),
    Flags(
        "weights that are no mapping",
        ("--model.combiner=Linear", "--model.combiner.weights={good:1}"),
        ("'model.combiner.weights' must be dict or null; got '{good:1}'",),
    ),
    Flags(
        "all weights 0",
        ("--model.combiner=PGAPO", "--model.combiner.weights={good: 0, short: 0}"),
        ("at least one objective needs a weight above 0; all are 0",),
    ),
    Flags(
        "threshold of nothing",
        ("--model.combiner=Lagrangian", "--model.combiner.thresholds={long: 0.5}"),
        ("Lagrangian.thresholds names 'long', which is no trained objective; they are good, short",),
    ),
    Flags(
        "scores have no tokens",
        ("--model.combiner=Tchebycheff", "--model.combiner.granularity=token"),
        ("Tchebycheff has no field 'granularity': its score is one of whole responses", "PAMA and Linear"),
    ),
    Flags(
        "too few objectives",
        (
            "--model.combiner=Gramian",
            "--model.combiner.weighting=KrumWeighting",
            "--model.combiner.weighting.n_byzantine=1",
        ),
        ("KrumWeighting cannot weigh 2 objectives", "at least 4"),
    ),
    Flags(
        "weighting without its setting",
        ("--model.combiner=Gramian", "--model.combiner.weighting=CAGradWeighting"),
        ("model.combiner.weighting.c is missing; give it as --model.combiner.weighting.c=...",),
    ),
    Flags(
        "weighting that is not there",
        ("--model.combiner=Gramian", "--model.combiner.weighting=UPGradWeigting"),
        ("unknown weighting 'UPGradWeigting'; did you mean 'UPGradWeighting'?",),
    ),
    Flags(
        "field of a class not named",
        ("--model.loss.cliprange=0.3",),
        ("write --model.loss=NAME --model.loss.cliprange=0.3; known: ClippedSurrogate",),
    ),
    Flags("column", ("--data.prompt_column=promt",), ("no column 'promt'", "did you mean 'prompt'")),
    Flags("policy", ("--model.policy.path=./nowhere",), ("policy.path: folder './nowhere' does not exist",)),
    Flags("checkpoint", ("--ckpt_path=nowhere.ckpt",), ("ckpt_path: 'nowhere.ckpt' does not exist",)),
    Flags(
        "function",
        (f"--model.objectives.good.reward.function={REWARD.format('goodnes')}",),
        ("objective 'good'", "has no 'goodnes'", "did you mean 'goodness'"),
    ),
    Flags(
        "context",
        ("--model.source.max_new_tokens=30",),
        ("row", "the prompt has", "max_new_tokens 30", "context of 32", "Lower it"),
    ),
]  # fmt: skip


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("case", FLAGS, ids=lambda case: case.name)
def test_flags(task: Task, capsys: pytest.CaptureFixture[str], case: Flags) -> None:
    line = complaint(capsys, "fit", "--config", task.config, *case.flags)
    assert re.search(".*".join(map(re.escape, case.says)), line), line
    assert not task.root.exists(), "a run that did not start left a folder"


def test_the_cases_above_fail_for_what_they_add(task: Task) -> None:
    moa("fit", "--config", task.config, "--trainer.max_steps=1")
    assert task.root.exists()


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: s["model"].update(combiner={"class_path": "PANA"}), "unknown combiner 'PANA'; did you mean 'PAMA'"),
        (
            lambda s: s["model"].update(combiner={"class_path": "PAMA", "init_args": {"nooon": True}}),
            "PAMA has no field 'nooon'; did you mean 'noon'",
        ),
        (lambda s: s["model"]["objectives"]["good"].update(wieght=2), "no field 'wieght'; did you mean 'weight'"),
        (
            lambda s: s["model"]["objectives"]["good"].update(weight="x"),
            "unknown weight 'x'; known: a number, ConstantWeight, LinearWeight, PiecewiseWeight",
        ),
        (
            lambda s: s["model"]["objectives"]["good"]["reward"].update(class_path="FunctionRewrd"),
            "unknown reward 'FunctionRewrd'; did you mean 'FunctionReward'",
        ),
        (
            lambda s: s["model"]["objectives"]["good"]["reward"]["init_args"].update(functon="f"),
            "FunctionReward has no field 'functon'; did you mean 'function'",
        ),
        (lambda s: s["model"].update(sorce={}, combinr="PAMA"), "unknown option 'model.combinr'; did you mean '--mod"),
        (lambda s: s["trainer"].update(max_step=3), "unknown option 'trainer.max_step'; did you mean '--trainer.max_"),
        (lambda s: s["model"].pop("policy"), "model.policy.path is missing; give it as --model.policy.path=..."),
        (lambda s: s["model"].update(objectives={}), "there are no objectives; name at least one"),
    ],
)
def test_settings(
    task: Task, capsys: pytest.CaptureFixture[str], change: Callable[[dict[str, Any]], None], says: str
) -> None:
    assert says in complaint(capsys, "fit", "--config", changed(task, change))
    assert not task.root.exists()


@pytest.mark.usefixtures("no_weights")
def test_an_objective_named_twice(task: Task, capsys: pytest.CaptureFixture[str]) -> None:
    text = task.config.read_text().replace("    short:\n", "    good:\n")
    twice = task.folder / "twice.yaml"
    twice.write_text(text)
    number = max(i for i, line in enumerate(text.splitlines(), start=1) if line == "    good:")
    for spelling in (["--config", twice], [f"--config={twice}"], ["-c", twice]):
        line = complaint(capsys, "fit", *spelling)
        assert line == f"{twice}, line {number}: 'good' is given twice; rename or remove one of them"


@pytest.mark.parametrize("command", ["fit", "predict", "sft", "reward", "export"])
@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "config file '{path}' does not exist; did you mean '{near}'?"),
        ("trainer:\n  max_steps: 1\n  devices: [1\nmodel: 2\n", "{path}, line 4 is not YAML: "),
        ("", "{path} must hold settings"),
        ("- a\n- b\n", "{path} must hold settings"),
    ],
    ids=["missing", "malformed", "empty", "list"],
)
def test_config_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, content: str | None, says: str
) -> None:
    (tmp_path / "task.yaml").touch()
    path = tmp_path / "tusk.yaml"
    if content is not None:
        path.write_text(content)
    assert says.format(path=path, near=tmp_path / "task.yaml") in complaint(capsys, command, "--config", path)


def test_a_loss_that_is_not_finite(
    task: Task, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(names.too_late, "calls", 0)
    config = changed(
        task,
        lambda s: s["model"]["objectives"]["short"]["reward"]["init_args"].update(function=REWARD.format("too_late")),
    )
    fit = ["fit", "--config", config, "--trainer.max_steps=2", "--checkpoint.every_n_train_steps=1"]
    line = complaint(capsys, *fit)
    assert names.too_late.calls == 4
    assert line.startswith("the loss is not finite at step 1: objective short (value_loss/short")
    checkpoint = task.root / "non_finite.ckpt"
    assert f"The state before this update is in {checkpoint}" in line
    assert "lower the learning rate, or clip that objective's reward" in line

    # The update did not happen: the checkpoint holds finite weights, and one can go on from it.
    saved = torch.load(checkpoint, weights_only=True)
    assert saved["global_step"] == 1
    assert all(bool(weight.isfinite().all()) for weight in saved["state_dict"].values())
    # Nothing that was written before is lost.
    assert (task.root / "config.yaml").is_file()
    assert (task.root / "checkpoints" / "step-1.ckpt").is_file()
    with (task.root / "metrics.csv").open(newline="") as file:
        losses = [row["loss"] for row in csv.DictReader(file) if row["loss"]]
    assert len(losses) == 1
    with (task.root / "front.csv").open(newline="") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["0", "1"]
    samples = [json.loads(text) for text in (task.root / "samples.jsonl").read_text().splitlines()]
    assert {sample["step"] for sample in samples} == {0, 1}
    assert json.loads((task.root / "summary.json").read_text())["steps"] == 1

    monkeypatch.setattr(names.too_late, "calls", -100)
    moa(*fit, f"--ckpt_path={checkpoint}")
    assert json.loads((task.root / "summary.json").read_text())["steps"] == 2


def test_a_traceback_on_demand(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOA_DEBUG", "1")
    with pytest.raises(ValueError, match="unknown combiner 'PANA'"):
        moa("fit", "--config", task.config, "--model.combiner=PANA")


def test_two_classes_of_one_name() -> None:
    message = (
        'Parser key "data":\n  Does not validate against any of the Union subtypes\n  Subtypes: [...]\n  Errors:\n'
        "    - Multiple subclasses with name Prompts. Give the full class path to avoid ambiguity: a.Prompts, b.Prompts"
        ".\n"
        "    - Expected a <class 'NoneType'>\n  Given value type: <class 'dict'>\n  Given value: {}"
    )
    line = "data: several classes are called 'Prompts'; give the import path of one of them: a.Prompts, b.Prompts"
    assert explain(message, (), ()) == line
