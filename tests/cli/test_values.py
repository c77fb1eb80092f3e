"""A run with a cost, from fit to the exported card: the value decides, and the raw score stands beside it."""

import contextlib
import csv
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cli.task import Task, goodness, make, moa

STEPS = ["0", "1", "2"]


def length(prompts: list[str], completions: list[str], **columns: list[Any]) -> list[float]:
    """A cost: words, in units of the most there can be."""
    return [len(text.split()) / 6 for text in completions]


def minus_length(prompts: list[str], completions: list[str], **columns: list[Any]) -> list[float]:
    """The same as a reward."""
    return [-cost for cost in length(prompts, completions)]


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def function(of: Any, **transform: Any) -> dict[str, Any]:
    reward = {"class_path": "FunctionReward", "init_args": {"function": f"{of.__module__}.{of.__name__}"}}
    return {"reward": reward, **transform}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Task, str]]:
    """Two steps under a threshold of -.1, with the length as a cost and as the reward that it is the negative of."""
    made: dict[str, tuple[Task, str]] = {}
    for kind, objective in (("cost", function(length, scale=-1.0)), ("reward", function(minus_length))):
        task = make(tmp_path_factory.mktemp(kind))
        settings = task.settings()
        settings["model"]["objectives"] = {
            "good": function(goodness),
            "cost": objective,
            "mood": function(goodness, scale=0.5, shift=0.25, clip=[0.0, 1.0], eval_only=True),
        }
        combiner = {"class_path": "Lagrangian", "init_args": {"primary": "good", "thresholds": {"cost": -0.1}}}
        settings["model"]["combiner"] = combiner
        settings["data"]["init_args"]["val_size"] = 6
        task.config.write_text(yaml.safe_dump(settings))
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            moa("fit", "--config", task.config, "--trainer.enable_progress_bar=true")
        made[kind] = task, "\n".join(" ".join(line.split()) for line in printed.getvalue().splitlines())
    return made


def summary(task: Task) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((task.root / "summary.json").read_text())
    return found


def test_front_and_summary_are_those_of_the_reward(runs: dict[str, tuple[Task, str]]) -> None:
    (cost, _), (reward, _) = runs["cost"], runs["reward"]
    fronts = {kind: rows(task.root / "front.csv") for kind, (task, _) in runs.items()}
    assert [row["step"] for row in fronts["cost"]] == STEPS
    assert [{key: row[key] for key in fronts["reward"][0]} for row in fronts["cost"]] == fronts["reward"]
    assert all(float(row["cost"]) == -float(row["cost_raw"]) < 0 for row in fronts["cost"])
    assert summary(cost)["hypervolume"] == summary(reward)["hypervolume"]
    assert summary(cost)["duals"] == summary(reward)["duals"]
    for name in ("good", "mood"):
        assert summary(cost)["objectives"][name] == summary(reward)["objectives"][name]
    of_cost, of_reward = (summary(task)["objectives"]["cost"] for task in (cost, reward))
    assert {key: of_cost[key] for key in of_reward} == {**of_reward, "transform": "-1 x raw"}
    assert of_cost["raw_end"] == -of_cost["end"]


def test_a_clipped_mean_is_the_mean_of_clipped_values(runs: dict[str, tuple[Task, str]]) -> None:
    task, _ = runs["cost"]
    samples = [json.loads(line) for line in (task.root / "samples.jsonl").read_text().splitlines()]
    last = [sample for sample in samples if sample["step"] == 2]
    assert len(last) == 6
    values = [min(max(0.5 * sample["scores"]["mood"] + 0.25, 0.0), 1.0) for sample in last]
    assert [sample["values"] for sample in last] == [
        {"cost": -sample["scores"]["cost"], "mood": value} for sample, value in zip(last, values, strict=True)
    ]
    mood = summary(task)["objectives"]["mood"]
    assert mood["end"] == pytest.approx(sum(values) / 6)
    assert mood["end"] > 0.5 * mood["raw_end"] + 0.25 + 0.05  # so the clip counts here
    assert mood["transform"] == "0.5 x raw + 0.25, clipped to [0, 1]"


def test_curves_hold_the_first_evaluation_and_count_steps_as_the_front_does(runs: dict[str, tuple[Task, str]]) -> None:
    task, _ = runs["cost"]
    logged, front = rows(task.root / "metrics.csv"), rows(task.root / "front.csv")
    for key, column in (("rewards/cost", "cost_raw"), ("values/cost", "cost"), ("rewards/good", "good")):
        curve = {row["step"]: float(row[f"val/{key}/mean"]) for row in logged if row[f"val/{key}/mean"]}
        assert list(curve) == STEPS, key
        assert list(curve.values()) == pytest.approx([float(row[column]) for row in front], rel=1e-6)
    assert [row["step"] for row in logged if row["pareto/hypervolume"]] == STEPS
    assert [row["step"] for row in logged if row["loss"]] == STEPS[:2]  # the first update is made at step 0
    means = [(float(row["rewards/cost/mean"]), float(row["values/cost/mean"])) for row in logged if row["loss"]]
    assert all(value == -raw for raw, value in means)
    assert not [key for key in logged[0] if key.endswith("values/good/mean")]


def test_the_threshold_on_the_cost_is_missed_wherever_it_is_said(
    runs: dict[str, tuple[Task, str]], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A raw cost of .7 is above -.1; its value, -.7, is below."""
    for kind, (task, closing) in runs.items():
        assert -0.9 < summary(task)["objectives"]["cost"]["end"] < -0.5
        (row,) = [line for line in closing.splitlines() if line.startswith("cost -0.")]
        assert row.endswith(" -0.1 missed")
        raw = [line for line in closing.splitlines() if line.startswith("cost: value = -1 x raw; raw mean 0.")]
        assert len(raw) == (kind == "cost")
        # The rival is as good, and its responses are longer.
        rival = summary(task)
        rival["objectives"]["cost"]["end"] -= 0.05
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "summary.json").write_text(json.dumps(rival))
        capsys.readouterr()
        moa("compare", f"--runs=[{task.root},{tmp_path / kind}]", "--output", tmp_path / kind / "out")
        printed = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
        lines = [line for line in printed if line.strip().startswith((str(task.root), str(tmp_path / kind)))]
        assert [line.endswith("cost -0.1: missed") for line in lines[:2]] == [True, True]
        compared = rows(tmp_path / kind / "out" / "comparison.csv")
        assert [row["non_dominated"] for row in compared] == ["1", "0"]
        moa("export", task.root, tmp_path / kind / "exported")
        card = (tmp_path / kind / "exported" / "README.md").read_text()
        assert "- thresholds on held-out means: {cost: -0.1 missed}" in card
        (row,) = [line for line in card.splitlines() if line.startswith("| cost |")]
        value, shown = summary(task)["objectives"]["cost"], f"{-summary(task)['objectives']['cost']['end']:.4g}"
        assert f"| {value['end']:.4g} |" in row
        assert row.endswith(f"| {shown} |") == (kind == "cost")


def test_validate_evaluates_at_the_checkpoints_step(runs: dict[str, tuple[Task, str]]) -> None:
    task, _ = runs["cost"]
    moa("validate", "--config", task.config, f"--ckpt_path={task.root}/checkpoints/last.ckpt")
    folder = task.root / "validate"
    assert rows(folder / "front.csv") == rows(task.root / "front.csv")  # the last point again, and no second start
    assert [row["step"] for row in rows(folder / "metrics.csv")] == ["2"]


def test_the_card_of_an_old_run_has_values_where_they_follow(
    runs: dict[str, tuple[Task, str]], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Summaries held raw means only: the cost's value follows from the scale, a clipped mean does not."""
    task, _ = runs["cost"]
    shutil.copytree(task.root, tmp_path / "old", ignore=shutil.ignore_patterns("checkpoints"))
    old = summary(task)
    for numbers in old["objectives"].values():
        for key in ("start", "end", "std_error", "start_std_error"):
            numbers[key] = numbers.pop(f"raw_{key}", numbers[key])
        del numbers["transform"]
    (tmp_path / "old" / "summary.json").write_text(json.dumps(old))
    capsys.readouterr()
    moa("export", tmp_path / "old", tmp_path / "exported")
    printed = capsys.readouterr().out
    assert "means of values follow from its config.yaml (cost = -1 x raw)" in printed
    assert "the values of mood do not follow (clipped): no verdict, no place on the front" in printed
    facts = json.loads((tmp_path / "exported" / "moa.json").read_text())
    new = summary(task)["objectives"]
    assert facts["objectives"]["cost"] == pytest.approx(new["cost"])
    assert facts["objectives"]["good"] == new["good"]
    assert (facts["objectives"]["mood"]["end"], facts["objectives"]["mood"]["raw_end"]) == (
        None,
        new["mood"]["raw_end"],
    )
    assert facts["hypervolume"] is None  # it was that of raw scores
    card = (tmp_path / "exported" / "README.md").read_text()
    assert "{cost: -0.1 missed}" in card
    assert "Hypervolume" not in card
