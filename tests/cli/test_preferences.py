"""``moa`` on preference data: a whole run of MOPO from a YAML, and what users get wrong."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests import pairs, tiny
from tests.cli.task import complaint, moa

pytestmark = pytest.mark.filterwarnings("ignore:objective 'kind' did not score")

LABEL = {"class_path": "FromLabels"}


def settings(folder: Path) -> dict[str, Any]:
    """A run of MOPO."""

    def label(name: str) -> dict[str, Any]:
        return {"reward": {**LABEL, "init_args": {"label": name}}}

    return {
        "seed_everything": 7,
        "trainer": {
            "default_root_dir": str(folder / "run"),
            "max_steps": 6,
            "val_check_interval": 3,
            "accelerator": "cpu",
            "enable_progress_bar": False,
        },
        "data": {
            "class_path": "Preferences",
            "init_args": {"path": str(folder / "data.jsonl"), "val_size": 4, "batch_size": 4},
        },
        "model": {
            "policy": {"path": str(folder / "tiny")},
            "objectives": {
                "good": label("good"),
                "kind": label("kind"),
                "short": {
                    "reward": {
                        "class_path": "FunctionReward",
                        "init_args": {"function": f"{pairs.__name__}.shortness"},
                    }
                },
            },
            "combiner": {
                "class_path": "MOPO",
                "init_args": {
                    "primary": "good",
                    "thresholds": {"kind": 0.6, "short": 0.45},
                    "dual": {"class_path": "Projected", "init_args": {"lr": 1.0}},
                },
            },
            "loss": {"class_path": "WeightedLikelihood", "init_args": {"max_weight": 4.0}},
            "source": {"class_path": "PreferenceRows", "init_args": {"max_response_length": 8}},
            "reference": {"class_path": "LaggedCopy", "init_args": {"interval": 2}},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-2}},
        },
    }


def make(folder: Path) -> Path:
    tiny.policy_folder(folder / "tiny", scale=1.0)
    pairs.write(folder / "data.jsonl")
    (folder / "run.yaml").write_text(yaml.safe_dump(settings(folder), sort_keys=False))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make(tmp_path)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of six steps; nothing may change it."""
    folder = make(tmp_path_factory.mktemp("done"))
    moa("fit", "--config", folder / "run.yaml")
    return folder


def changed(folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    given = settings(folder)
    change(given)
    path = folder / "changed.yaml"
    path.write_text(yaml.safe_dump(given, sort_keys=False))
    return path


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


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (
            ["--model.combiner.thresholds={kind: 1.2}"],
            "MOPO.thresholds.kind must lie in (0, 1), as a win probability; got 1.2",
        ),
        (
            ["--model.combiner.thresholds={kind: 0.0}"],
            "MOPO.thresholds.kind must lie in (0, 1), as a win probability; got 0",
        ),
        (
            ["--model.combiner.thresholds={kin: 0.6}"],
            "MOPO.thresholds names 'kin', which is no trained objective; they are good, kind, short",
        ),
        (
            ["--model.combiner.thresholds={good: 0.6}"],
            "MOPO.thresholds names 'good', the primary objective, which is maximised; remove it",
        ),
        (["--model.combiner.primary=god"], "MOPO.primary 'god' is no trained objective; they are good, kind, short"),
        (
            ["--model.objectives.kind.reward.label=kin"],
            "objective 'kind': the data have no label 'kin'; they have good, kind",
        ),
        (
            ["--model.objectives.kind.scale=-1"],
            "FromLabels gives win probabilities, which scale -1 and shift 0 take out of [0, 1]; remove them, or turn ",
        ),
        (["--model.source=Rollout"], "MOPO needs wins, which Rollout does not provide; choose another combiner or "),
        (["--data.format=SafeRLHF"], "data.jsonl' line 1: there is no 'response_0'; the row has "),
        (["--data.format=Candidate"], "unknown format 'Candidate'; did you mean 'Candidates'"),
        (
            ["--data.format=ChosenRejected", "--data.format.objektive=h"],
            "ChosenRejected has no field 'objektive'; did ",
        ),
        (["--data.on_bad_row=ignore"], "'data.on_bad_row' must be one of fail, skip; got 'ignore'"),
        (["--model.reference.interval=0"], "LaggedCopy.interval must be at least 1, got 0"),
        (["--model.loss.max_weight=0"], "WeightedLikelihood needs max_weight > 0 (or null), got 0"),
        (["--model.source.win_scale=0"], "PreferenceRows needs max_response_length of at least 2, win_scale > 0 and "),
        (["--data.val_size=99"], "data.val_size 99 leaves nothing to train on: "),
        (
            ["--model.source.max_response_length=4"],
            "line 2: response 2 has 5 tokens with its end token, more than source.max_response_length 4; raise that, ",
        ),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_one_line_and_nothing_left_behind(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, flags: list[str], says: str
) -> None:
    monkeypatch.setattr("moa_lightning.strategies.load_model", lambda *a: pytest.fail("a model was loaded"))
    assert says in complaint(capsys, "fit", "--config", folder / "run.yaml", *flags)
    assert not (folder / "run").exists()


def test_labels_do_not_go_with_prompts(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def prompts(given: dict[str, Any]) -> None:
        given["data"]["class_path"] = "Prompts"

    line = complaint(capsys, "fit", "--config", changed(folder, prompts))
    assert line == "objective 'good': the data have no label 'good'; FromLabels goes with data class Preferences"


def test_labels_do_not_go_with_new_responses(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = complaint(
        capsys,
        "fit",
        "--config",
        folder / "run.yaml",
        "--model.source=Rollout",
        "--model.source.num_generations=2",
        "--model.source.max_new_tokens=6",
    )
    assert "FromLabels knows the responses of the data alone, not new ones; use source PreferenceRows" in line


def test_a_score_of_either_sign_does_not_go_with_weighted_likelihood(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = complaint(capsys, "fit", "--config", folder / "run.yaml", "--model.combiner=Linear")
    assert line.startswith("loss WeightedLikelihood needs weights of at least 0, and ")
    assert line.endswith(" is an advantage of either sign; use loss ClippedSurrogate with it")


def test_bad_rows_by_their_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = pairs.rows(16)
    rows[9]["preferences"]["good"] = {"winner": 7}
    rows[11]["responses"][1] = "very " * 40 + "bad"
    pairs.write(folder / "data.jsonl", rows)
    line = complaint(capsys, "fit", "--config", folder / "run.yaml")
    assert line.startswith(
        f"'{folder / 'data.jsonl'}' line 10: 'preferences.good': winner 7 is no candidate; there are"
    )
    assert line.endswith("; or set --data.on_bad_row=skip")
    rows[9] = rows[0]
    pairs.write(folder / "data.jsonl", rows)
    line = complaint(capsys, "fit", "--config", folder / "run.yaml")
    assert line.startswith(
        f"'{folder / 'data.jsonl'}' line 12: response 1 has 42 tokens with its end token, more than "
    )
    with pytest.warns(UserWarning, match=r"^1 of \d+ (train|validate) rows cannot be used and are left out; the first"):
        moa("fit", "--config", folder / "run.yaml", "--data.on_bad_row=skip", "--trainer.max_steps=1")
