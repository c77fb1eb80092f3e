"""``moa`` on preference data: a whole run of MOPO from a YAML."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.cli.preference_task import changed, make
from tests.cli.task import moa
from tests.helpers import pairs

pytestmark = pytest.mark.filterwarnings("ignore:objective 'kind' did not score", "ignore:MOPO's labels")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make(tmp_path)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of six steps; nothing may change it."""
    folder = make(tmp_path_factory.mktemp("done"))
    moa("fit", "--config", folder / "run.yaml")
    return folder


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def same(one: Any, two: Any) -> None:
    """Equal to the bit, in nested containers."""
    if isinstance(one, dict | list):
        assert len(one) == len(two)
        for key in one if isinstance(one, dict) else range(len(one)):
            same(one[key], two[key])
    elif torch.is_tensor(one):
        torch.testing.assert_close(one, two, rtol=0, atol=0, equal_nan=True)
    else:
        assert one == two


def test_mopo_from_end_to_end(done: Path) -> None:
    run = done / "run"
    record = yaml.safe_load((run / "config.yaml").read_text())["model"]
    assert record["combiner"]["init_args"]["thresholds"] == {"kind": 0.6, "short": 0.45}
    assert record["reference"]["init_args"] == {"interval": 2}

    summary = json.loads((run / "summary.json").read_text())
    assert (summary["combiner"], summary["steps"]) == ("MOPO", 6)
    assert list(summary["objectives"]) == ["good", "kind", "short"]
    for name, numbers in summary["objectives"].items():
        assert numbers["start"] == pytest.approx(0.5, abs=1e-6), name  # the loaded policy against itself
        assert 0 < numbers["end"] < 1
        assert numbers["end"] != numbers["start"]
    assert summary["held_out"] == pytest.approx({name: o["end"] for name, o in summary["objectives"].items()}, abs=1e-6)
    assert summary["held_out"]["kind"] != summary["values"]["kind"] != summary["believed"]["kind"]
    front = table(run / "front.csv")
    assert [row["step"] for row in front] == ["0", "3", "6"]
    assert float(front[-1]["good"]) == summary["objectives"]["good"]["end"]

    metrics = table(run / "metrics.csv")
    losses = [float(row["loss"]) for row in metrics if row["loss"]]
    assert len(losses) == 6
    assert all(loss > 0 for loss in losses)
    for column, low, high in (("ess", 0.0, 1.0), ("capped_ratio", 0.0, 1.0), ("score/mean", 0.0, 4.0)):
        values = [float(row[column]) for row in metrics if row["loss"]]
        assert all(low <= value <= high for value in values), column
    collected = [row for row in metrics if row["labelled/kind"]]
    assert len(collected) == 6
    assert all(float(row["labelled/good"]) == 1 for row in collected)
    assert any(float(row["labelled/kind"]) < 1 for row in collected)  # not on every row
    assert all(row["held_out/kind"] for row in collected[3:])  # from the evaluation after three updates on
    assert all(row["values/kind"] and row["believed/kind"] for row in collected)
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert {sample["completion"] for sample in samples} <= set(pairs.RESPONSES)

    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["moa"]
    assert int(checkpoint["combiner_state"]["batches"]) == 6
    assert checkpoint["combiner_state"]["thresholds"][1:].tolist() == pytest.approx([0.6, 0.45])
    assert checkpoint["combiner_state"]["duals"].max() > 0
    assert checkpoint["reference"]["step"] == 4


def test_two_calls_go_as_far_as_one(done: Path) -> None:
    halves = done / "halves"
    arguments = ["fit", "--config", done / "run.yaml", f"--trainer.default_root_dir={halves}"]
    moa(*arguments, "--trainer.max_steps=3")
    moa(*arguments, f"--ckpt_path={halves / 'checkpoints' / 'last.ckpt'}")
    one, two = (torch.load(run / "checkpoints" / "last.ckpt", weights_only=True) for run in (done / "run", halves))
    for checkpoint in (one, two):
        del checkpoint["moa"]["settings"]  # they name the run's folder, and what it was resumed from
    for part in ("state_dict", "moa"):
        same(two[part], one[part])
    ends = [json.loads((run / "summary.json").read_text())["objectives"] for run in (done / "run", halves)]
    assert ends[0] == ends[1]


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_a_checkpoint_is_measured_against_the_policy_it_started_from(done: Path, stage: str) -> None:
    end = json.loads((done / "run" / "summary.json").read_text())["objectives"]["good"]["end"]
    out = done / "predictions.jsonl"
    extra = [f"--predictions.path={out}"] if stage == "predict" else []
    checkpoint = done / "run" / "checkpoints" / "last.ckpt"
    moa(stage, "--config", done / "run.yaml", f"--ckpt_path={checkpoint}", *extra)
    if stage == "predict":
        predicted = [json.loads(line)["scores"]["good"] for line in out.read_text().splitlines()]
        assert sum(predicted) / len(predicted) == pytest.approx(end, abs=1e-6)
    elif stage == "test":
        assert float(table(done / "run" / "test" / "metrics.csv")[-1]["test/rewards/good/mean"]) == pytest.approx(end)
    else:
        again = json.loads((done / "run" / "validate" / "summary.json").read_text())
        assert again["objectives"]["good"]["end"] == pytest.approx(end, abs=1e-6)


@pytest.mark.parametrize("combiner", ["PAMA", "Linear"])
def test_the_other_way_round(folder: Path, combiner: str) -> None:
    flags = [f"--model.combiner={combiner}", "--model.loss=ClippedSurrogate", "--model.reference=FrozenCopy"]
    moa("fit", "--config", folder / "run.yaml", *flags, "--trainer.max_steps=2")
    assert json.loads((folder / "run" / "summary.json").read_text())["combiner"] == combiner


def test_mopo_on_rollouts_with_the_shipped_config(folder: Path) -> None:
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in pairs.PROMPTS * 2))

    def online(given: dict[str, Any]) -> None:
        model = given["model"]
        for name in ("combiner", "loss", "reference"):
            model.pop(name)
        model["source"] = {"class_path": "Rollout", "init_args": {"max_new_tokens": 6, "num_generations": 3}}
        length = {"reward": {"class_path": "Length", "init_args": {"divisor": 8.0}}}
        model["objectives"] = {"long": length, "short": model["objectives"]["short"]}
        given["data"] = {
            "class_path": "Prompts",
            "init_args": {"path": str(folder / "prompts.jsonl"), "val_size": 4, "batch_size": 4},
        }

    shipped = Path(__file__).parents[2] / "configs" / "combiner" / "mopo.yaml"
    moa("fit", "--config", changed(folder, online), "--config", shipped, "--trainer.max_steps=2")
    summary = json.loads((folder / "run" / "summary.json").read_text())
    assert (summary["combiner"], summary["steps"]) == ("MOPO", 2)


def test_a_published_layout_by_flags(folder: Path) -> None:
    rows = [
        {"prompt": f"the film {i}", "chosen": " good", "rejected": " very bad", "a": i % 3, "b": 1} for i in range(12)
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    moa(
        "fit", "--config", folder / "run.yaml", "--trainer.max_steps=1",
        "--data.format=ChosenRejected", "--data.format.objective=good", "--data.format.scores={kind: [a, b]}",
    )  # fmt: skip
    assert (folder / "run" / "summary.json").is_file()
