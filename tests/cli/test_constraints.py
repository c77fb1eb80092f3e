"""A run with a threshold: what it says at the end, and the best policy exported."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.cli.task import complaint, make, moa


def test_a_threshold_from_fit_to_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = make(tmp_path)
    moa("fit", "--config", task.config, "--trainer.enable_progress_bar=true", "--model.combiner=Lagrangian",
        "--model.combiner.thresholds={short: -9}")  # fmt: skip
    told = " ".join(capsys.readouterr().out.split())
    summary = json.loads((task.root / "summary.json").read_text())
    assert summary["thresholds_held"] == {"short": 1.0}
    assert "short: threshold held in 100% of the last 1 evaluations; multiplier from" in told
    assert f"best that meets all thresholds: step {summary['best']['step']} (good" in told
    header = (task.root / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"thresholds_held/short", "duals_range/short"} <= {*header}

    moa("export", task.root, tmp_path / "best", "--checkpoint=best")
    saved = torch.load(task.root / "checkpoints" / "best.ckpt", weights_only=True)
    assert saved["global_step"] == summary["best"]["step"]
    exported = load_file(tmp_path / "best" / "model.safetensors")
    name = "transformer.wte.weight"
    assert torch.equal(exported[name], next(v for k, v in saved["state_dict"].items() if k.endswith(name)))


def test_without_thresholds_there_is_no_best(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = make(tmp_path)
    moa("fit", "--config", task.config, "--trainer.max_steps=1")
    assert not (task.root / "checkpoints" / "best.ckpt").exists()
    assert "thresholds_held" not in json.loads((task.root / "summary.json").read_text())
    said = complaint(capsys, "export", task.root, tmp_path / "out", "--checkpoint=best")
    assert said == f"there is no best.ckpt in '{task.root / 'checkpoints'}'; runs with thresholds keep one"
