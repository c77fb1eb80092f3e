"""A run with a threshold: what it says at the end, and the best policy exported."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from moa_lightning.commands.fit.summary import thresholds_held
from tests.cli.task import complaint, make, moa


def test_a_threshold_from_fit_to_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = make(tmp_path)
    moa("fit", "--config", task.config, "--trainer.enable_progress_bar=true", "--model.combiner=Lagrangian",
        "--model.combiner.thresholds={short: -9}")  # fmt: skip
    told = " ".join(capsys.readouterr().out.split())
    summary = json.loads((task.root / "summary.json").read_text())
    assert summary["thresholds_held"] == {"short": 1.0}
    assert "short: threshold held (within the 95 % interval counts) in the last evaluation; mult" in told
    best = summary["best"]
    assert f"best: step {best['step']}, held-out means reach all thresholds (good {best['primary']:.3f}; short " in told
    assert f"; short {best['means']['short']:.3f}, threshold -9: met); moa export RUN DIR --checkpoint=best" in told
    header = (task.root / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"thresholds_held/short", "duals_range/short"} <= {*header}

    moa("export", task.root, tmp_path / "best", "--checkpoint=best")
    card = (tmp_path / "best" / "README.md").read_text()
    assert "- thresholds on held-out means: {short: -9 met}\n" in card
    assert json.loads((tmp_path / "best" / "moa.json").read_text())["thresholds"] == {"short": -9.0}
    moa("validate", "--config", task.root / "config.yaml", "--ckpt_path=best")
    assert json.loads((task.root / "validate" / "summary.json").read_text())["steps"] == best["step"]
    saved = torch.load(task.root / "checkpoints" / "best.ckpt", weights_only=True)
    assert saved["global_step"] == summary["best"]["step"]
    exported = load_file(tmp_path / "best" / "model.safetensors")
    name = "transformer.wte.weight"
    assert torch.equal(exported[name], next(v for k, v in saved["state_dict"].items() if k.endswith(name)))


def test_the_best_is_called_met_only_where_its_interval_says_so() -> None:
    best = {
        "step": 9,
        "feasible": True,
        "primary_objective": "good",
        "primary": 0.7,
        "thresholds": {"short": 0.5, "kind": 0.5},
        "means": {"good": 0.7, "short": 0.51, "kind": 0.6, "watched": 3.0},
        "std_errors": {"good": 0.015, "short": 0.015, "kind": 0.015, "watched": None},
    }
    means = "good 0.700; short 0.510, threshold 0.5: open; kind 0.600, threshold 0.5: met"
    assert thresholds_held({"best": best}) == [
        f"best: step 9, held-out means reach all thresholds ({means}); moa export RUN DIR --checkpoint=best"
    ]
    best |= {"feasible": False, "means": {"good": 0.7, "short": 0.49, "kind": 0.4}}
    means = "good 0.700; short 0.490, threshold 0.5: open; kind 0.400, threshold 0.5: missed"
    assert thresholds_held({"best": best}) == [
        f"nearest: step 9, held-out means do not reach all thresholds ({means}); moa export RUN DIR --checkpoint=best"
    ]
    old = {"step": 9, "feasible": True, "violation": 0.0, "primary": 0.7, "means": {"good": 0.7, "short": 0.51}}
    assert thresholds_held({"best": old}) == [
        (
            "best: step 9, held-out means reach all thresholds (primary objective 0.700); "
            "moa export RUN DIR --checkpoint=best"
        )
    ]


def test_without_thresholds_there_is_no_best(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = make(tmp_path)
    moa("fit", "--config", task.config, "--trainer.max_steps=1")
    assert not (task.root / "checkpoints" / "best.ckpt").exists()
    assert "thresholds_held" not in json.loads((task.root / "summary.json").read_text())
    said = complaint(capsys, "export", task.root, tmp_path / "out", "--checkpoint=best")
    assert said == f"there is no best.ckpt in '{task.root / 'checkpoints'}'; runs with thresholds keep one"
    said = complaint(capsys, "validate", "--config", task.root / "config.yaml", "--ckpt_path=best")
    none = task.root / "checkpoints" / "best.ckpt"
    assert said.startswith(f"ckpt_path: 'best' finds no {none}: runs with thresholds")
