"""Runs of ``moa``, from the command line to the files that they leave."""

import csv
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.cli.task import Task, make, moa

FILES = {
    "checkpoints",
    "config.yaml",
    "front.csv",
    "front.png",
    "metrics.csv",
    "policy",
    "samples.jsonl",
    "summary.json",
}


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def digests(folder: Path) -> dict[str, str]:
    """What is in a folder, file by file."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def weights(folder: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    return state


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Task:
    """A task with one finished run of PAMA; nothing may change it."""
    task = make(tmp_path_factory.mktemp("done"))
    moa("fit", "--config", task.config, "--model.combiner=PAMA")
    return task


@pytest.mark.parametrize("combiner", ["PAMA", "Linear", "MGDAUB"])
@pytest.mark.parametrize(
    ("flag", "given", "kept"),
    [
        ("max_steps", "2", 2),
        ("gradient_clip_val", "0.5", 0.5),
        ("accumulate_grad_batches", "2", 2),
        ("precision", "bf16-mixed", "bf16-mixed"),
    ],
)
def test_every_combiner_under_the_trainers_flags(
    task: Task, combiner: str, flag: str, given: str, kept: object
) -> None:
    moa("fit", "--config", task.config, f"--model.combiner={combiner}", f"--trainer.{flag}={given}")

    assert {path.name for path in task.root.iterdir()} == FILES
    record = yaml.safe_load((task.root / "config.yaml").read_text())
    assert record["model"]["combiner"]["class_path"].endswith(f".{combiner}")
    assert record["trainer"][flag] == kept
    assert record["trainer"]["default_root_dir"] == str(task.root)

    summary = json.loads((task.root / "summary.json").read_text())
    assert set(summary) == {
        "combiner", "steps", "seconds", "tokens_per_second", "seed", "data_seed", "model_seed", "objectives",
        "hypervolume",
    }  # fmt: skip
    assert (summary["combiner"], summary["steps"], summary["seed"]) == (combiner, 2, 7)
    assert summary["seconds"] > 0
    assert summary["tokens_per_second"] > 0
    assert list(summary["objectives"]) == ["good", "short"]
    for numbers in summary["objectives"].values():
        assert {"start", "end", "std_error"} <= set(numbers)
    volume = summary["hypervolume"]
    assert volume["end"] >= volume["start"] > 0
    assert set(volume["reference"]) == {"good", "short"}

    front = rows(task.root / "front.csv")
    assert [row["step"] for row in front] == ["0", "1", "2"]
    assert float(front[-1]["good"]) == summary["objectives"]["good"]["end"]
    assert (task.root / "front.png").read_bytes().startswith(b"\x89PNG")
    losses = [float(row["loss"]) for row in rows(task.root / "metrics.csv") if row["loss"]]
    assert len(losses) >= 2
    samples = lines(task.root / "samples.jsonl")
    assert {sample["step"] for sample in samples} == {0, 1, 2}
    assert all(set(sample["scores"]) == {"good", "short"} for sample in samples)

    assert {path.name for path in (task.root / "checkpoints").iterdir()} == {"last.ckpt", "step-2.ckpt"}
    AutoTokenizer.from_pretrained(task.root / "policy")
    before, after = weights(task.policy), weights(task.root / "policy")
    assert set(before) == set(after)
    assert any(not torch.equal(before[name], after[name]) for name in before), "nothing was learnt"
    assert all(bool(weight.isfinite().all()) for weight in after.values())


def test_validate_has_a_folder_of_its_own(done: Task) -> None:
    summary = json.loads((done.root / "summary.json").read_text())
    before = digests(done.root)
    moa("validate", "--config", done.root / "config.yaml", f"--model.policy.path={done.root / 'policy'}")
    after = digests(done.root)
    assert before.items() <= after.items(), "the run's own files have changed"
    written = {name for name in after if name not in before}
    assert written
    assert all(name.startswith("validate/") for name in written)
    # The aligned policy answers the same prompts with the same random numbers as at the end of the run.
    again = json.loads((done.root / "validate" / "summary.json").read_text())
    for name, numbers in again["objectives"].items():
        assert numbers["end"] == summary["objectives"][name]["end"]


def test_validate_from_a_checkpoint(done: Task) -> None:
    summary = json.loads((done.root / "summary.json").read_text())
    before = digests(done.root)
    checkpoint = done.root / "checkpoints" / "last.ckpt"
    moa("validate", "--config", done.config, f"--ckpt_path={checkpoint}", "--trainer.default_root_dir=elsewhere")
    assert before.items() <= digests(done.root).items()
    newest = max(done.root.glob("validate*"), key=lambda folder: folder.stat().st_mtime_ns)
    again = json.loads((newest / "summary.json").read_text())
    for name, numbers in again["objectives"].items():
        assert numbers["end"] == summary["objectives"][name]["end"]


def test_test(done: Task, capsys: pytest.CaptureFixture[str]) -> None:
    before = digests(done.root)
    moa("test", "--config", done.config, f"--model.policy.path={done.root / 'policy'}")
    assert before.items() <= digests(done.root).items()
    tested = rows(done.root / "test" / "metrics.csv")[-1]
    assert {"test/rewards/good/mean", "test/rewards/short/mean"} <= set(tested)
    assert "test/rewards/good/mean" in capsys.readouterr().out


def test_predict_writes_every_score(done: Task) -> None:
    before = digests(done.root)
    out = done.folder / "predictions.jsonl"
    moa("predict", "--config", done.config, f"--predictions.path={out}")
    assert digests(done.root) == before
    predicted = lines(out)
    assert len(predicted) == 4
    for line in predicted:
        assert set(line["scores"]) == {"good", "short"}
        words = line["completion"].split()
        assert line["scores"]["short"] == -abs(len(words) - line["columns"]["wish"]) / 4
        assert line["prompt"]


def test_wandb_offline(task: Task) -> None:
    moa("fit", "--config", task.config, "--wandb=offline", "--trainer.max_steps=1")
    runs = list((task.root / "wandb").glob("offline-run-*"))
    assert len(runs) == 1
    assert list(runs[0].glob("*.wandb"))
    assert {path.name for path in task.root.iterdir()} == FILES | {"wandb"}


def test_a_users_own_logger_does_not_move_the_files(task: Task) -> None:
    moa(
        "fit", "--config", task.config, "--trainer.max_steps=1",
        "--trainer.logger=CSVLogger", f"--trainer.logger.save_dir={task.folder / 'logs'}",
    )  # fmt: skip
    assert {path.name for path in task.root.iterdir()} == FILES
    assert list((task.folder / "logs").rglob("metrics.csv"))


def test_a_second_run_gets_a_folder_of_its_own(task: Task, capsys: pytest.CaptureFixture[str]) -> None:
    moa("fit", "--config", task.config, "--trainer.max_steps=1")
    assert "run-2" not in capsys.readouterr().out
    before = digests(task.root)
    moa("fit", "--config", task.config, "--trainer.max_steps=1", "--model.combiner=Linear")
    second = task.root.with_name("run-2")
    assert f"{task.root} holds a run already; this one goes to {second}\n" in capsys.readouterr().out
    assert digests(task.root) == before
    assert {path.name for path in second.iterdir()} == FILES
    assert json.loads((second / "summary.json").read_text())["combiner"] == "Linear"


def test_the_saved_config_repeats_the_run(task: Task) -> None:
    moa("fit", "--config", task.config, "--model.combiner=Linear", "--model.combiner.weights={good: 3.0, short: 1.0}")
    moa("fit", "--config", task.root / "config.yaml")
    again = task.root.with_name("run-2")
    first, second = (json.loads((run / "summary.json").read_text()) for run in (task.root, again))
    assert first["objectives"] == second["objectives"]
    for name, weight in weights(task.root / "policy").items():
        assert torch.equal(weight, weights(again / "policy")[name]), name


def test_going_on_from_a_checkpoint_stays_in_its_folder(task: Task) -> None:
    moa("fit", "--config", task.config)
    first = task.root.with_name("first")
    moa("fit", "--config", task.config, f"--trainer.default_root_dir={first}", "--trainer.max_steps=1")
    other = digests(task.root)
    samples = (first / "samples.jsonl").read_text()
    # The config still names the other run's folder: the checkpoint's own folder counts.
    moa("fit", "--config", task.config, f"--ckpt_path={first / 'checkpoints' / 'last.ckpt'}")

    assert digests(task.root) == other
    assert {path.name for path in first.parent.iterdir()} == {"run", "first"}
    assert (first / "samples.jsonl").read_text().startswith(samples)
    assert [row["step"] for row in rows(first / "front.csv")] == ["0", "1", "2"]
    assert json.loads((first / "summary.json").read_text())["steps"] == 2
    straight, resumed = weights(task.root / "policy"), weights(first / "policy")
    assert all(torch.equal(straight[name], resumed[name]) for name in straight), "resumed is not the same run"
    # The record is for running it anew, not for going on once more.
    assert yaml.safe_load((first / "config.yaml").read_text())["ckpt_path"] is None
