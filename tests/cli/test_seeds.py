"""What seeds a run: ``seed_everything``, unless a part has a seed of its own; and what records it."""

import csv
import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from moa_lightning.data import Prompts
from moa_lightning.utils.random_state import run_seed
from tests.cli.task import Task, complaint, moa


def fit(task: Task, name: str, *options: object) -> Path:
    """A run of its own, as a fresh process would do it."""
    os.environ.pop("PL_GLOBAL_SEED", None)
    root = task.folder / "runs" / name
    moa("fit", "--config", task.config, f"--trainer.default_root_dir={root}", *options)
    return root


def outcome(root: Path) -> tuple[str, list[dict[str, str]], bytes]:
    """Samples, metrics but for those of time, and the trained weights."""
    with (root / "metrics.csv").open(newline="", encoding="utf-8") as file:
        rows = [{k: v for k, v in row.items() if not k.startswith("throughput/")} for row in csv.DictReader(file)]
    weights = (root / "policy" / "model.safetensors").read_bytes()
    return (root / "samples.jsonl").read_text(), rows, weights


def first_batch(root: Path) -> tuple[str, str]:
    """What the first collected batch scored, which its prompts and its sampled responses decide."""
    row = next(row for row in outcome(root)[1] if row["loss"])
    return row["rewards/good/mean"], row["rewards/short/mean"]


def evaluations(root: Path) -> list[str]:
    """Responses of the evaluation before the first update."""
    samples = [json.loads(line) for line in (root / "samples.jsonl").read_text().splitlines()]
    return [json.dumps(sample, sort_keys=True) for sample in samples if sample["step"] == 0]


def summary(root: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((root / "summary.json").read_text())
    return {name: found[name] for name in ("seed", "data_seed", "model_seed")}


def recorded(root: Path) -> tuple[Any, Any, Any]:
    settings = yaml.safe_load((root / "config.yaml").read_text())
    return settings["seed_everything"], settings["data"]["init_args"]["seed"], settings["model"]["seed"]


def test_two_seeds_differ_one_repeats_and_a_seed_by_hand_wins(task: Task) -> None:
    seven, again, eight = fit(task, "7"), fit(task, "again"), fit(task, "8", "--seed_everything=8")
    assert outcome(again) == outcome(seven)
    for of_eight, of_seven in zip(outcome(eight), outcome(seven), strict=True):
        assert of_eight != of_seven
    assert first_batch(eight) != first_batch(seven)
    assert evaluations(eight) != evaluations(seven)
    assert summary(seven) == {"seed": 7, "data_seed": 7, "model_seed": 7}
    assert recorded(eight) == (8, 8, 8)

    data = fit(task, "data", "--seed_everything=8", "--data.init_args.seed=7")
    assert first_batch(data) == first_batch(seven)
    assert evaluations(data) == evaluations(eight)
    assert summary(data) == {"seed": 8, "data_seed": 7, "model_seed": 8}
    model = fit(task, "model", "--seed_everything=8", "--model.seed=7")
    assert first_batch(model) == first_batch(eight)
    assert evaluations(model) == evaluations(seven)
    assert recorded(model) == (8, 8, 7)


def test_a_drawn_seed_is_recorded_repeated_and_kept(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = iter([4_000_000_001, 5])
    monkeypatch.setattr("moa_lightning.commands.fit.seeds.secrets.randbelow", lambda below: next(drawn))
    first = fit(task, "first", "--seed_everything=true")
    seeds = recorded(first)
    assert seeds == (4_000_000_001,) * 3
    assert tuple(summary(first).values()) == seeds

    again = fit(task, "again", f"--config={first / 'config.yaml'}", f"--trainer.default_root_dir={first}-again")
    assert not again.exists()
    assert outcome(Path(f"{first}-again")) == outcome(first)

    resumed = fit(task, "first", "--seed_everything=true", "--ckpt_path=last", "--trainer.max_steps=3")
    assert recorded(resumed) == seeds
    assert recorded(fit(task, "other", "--seed_everything=true", "--trainer.max_steps=1")) == (5, 5, 5)


def test_a_resumed_run_keeps_the_seeds_that_it_was_started_with(task: Task, capsys: pytest.CaptureFixture[str]) -> None:
    # As runs were before the two followed ``seed_everything``.
    straight = fit(task, "straight", "--data.init_args.seed=0", "--model.seed=0", "--trainer.max_steps=3")
    root = fit(task, "run", "--data.init_args.seed=0", "--model.seed=0")
    capsys.readouterr()
    fit(task, "run", "--ckpt_path=last", "--trainer.max_steps=3")
    said = capsys.readouterr().out
    assert "resumed: data.init_args.seed 7 is not used, 0 is kept" in said
    assert "resumed: model.seed 7 is not used, 0 is kept" in said
    assert recorded(root) == (7, 0, 0)
    assert outcome(root)[2] == outcome(straight)[2]
    fit(task, "run", "--ckpt_path=last", "--trainer.max_steps=4", "--data.init_args.seed=3")
    assert "resumed: data.init_args.seed 3 is not used, 0 is kept" in capsys.readouterr().out
    assert recorded(root) == (7, 0, 0)


def test_false_seeds_nothing_but_what_must_have_a_seed(task: Task) -> None:
    root = fit(task, "unseeded", "--seed_everything=false", "--trainer.max_steps=1")
    assert summary(root) == {"seed": None, "data_seed": 0, "model_seed": 0}
    assert recorded(root) == (False, 0, 0)


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_out_of_range_is_one_line(task: Task, capsys: pytest.CaptureFixture[str], seed: int) -> None:
    line = complaint(capsys, "fit", "--config", task.config, f"--seed_everything={seed}")
    assert line == f"seed_everything must be from 0 to 4294967295, true or false, got {seed}"
    assert not task.root.exists()


@pytest.mark.parametrize("variable", ["WORLD_SIZE", "SLURM_NTASKS"])
def test_processes_of_a_launcher_do_not_each_draw_a_seed(
    task: Task, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "2")
    line = complaint(capsys, "fit", "--config", task.config, "--seed_everything=true")
    assert line.endswith("would draw another seed in each of the launcher's processes; give a number")


def test_from_python_the_last_seed_counts(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_seed() == 0
    data = Prompts(str(task.prompts))
    monkeypatch.setenv("PL_GLOBAL_SEED", "3")  # what ``lightning.seed_everything`` leaves
    assert run_seed(data.seed) == 3
    assert run_seed(Prompts(str(task.prompts), seed=5).seed) == 5
