"""A real run with every callback, watched by Weights & Biases offline."""

import csv
import json

import pytest
from lightning.pytorch.loggers import WandbLogger

from moa_lightning.callbacks import (
    MetricsFile,
    ObjectiveMetrics,
    ObjectiveProgressBar,
    ParetoFront,
    RunFiles,
    SampleTable,
    Throughput,
)
from tests import tiny
from tests.test_module import FilmPrompts, module, trainer


def test_a_run_with_everything(tmp_path):
    wandb_logger = WandbLogger(project="moa-tests", save_dir=tmp_path / "tracking", offline=True)
    watchers = [ObjectiveMetrics(), Throughput(), ParetoFront(), SampleTable(rows=3), RunFiles()]
    running = trainer(
        tmp_path,
        max_steps=4,
        callbacks=[*watchers, ObjectiveProgressBar()],
        logger=[wandb_logger, MetricsFile(str(tmp_path / "run"))],
        log_every_n_steps=1,
        enable_progress_bar=True,
    )
    try:
        running.fit(module(tiny.policy_folder(tmp_path / "policy")), datamodule=FilmPrompts(batch_size=4))
        logged = set(wandb_logger.experiment.summary.keys())
        assert {"samples", "pareto/front", "pareto/picture", "pareto/hypervolume"} <= logged
        assert "pareto/good_length_table" in logged  # the data of the scatter
    finally:
        wandb_logger.experiment.finish()

    (media,) = (tmp_path / "tracking").glob("wandb/offline-run-*/files/media")
    samples = [json.loads(file.read_text()) for file in sorted(media.rglob("samples_*.table.json"))]
    rewards = ["rewards/good", "rewards/length"]
    assert len(samples) == 3  # at 0, 2 and 4 steps
    assert samples[0]["columns"] == ["step", "prompt", "completion", *rewards, "length", "truncated"]
    assert all(len(table["data"]) == 3 for table in samples)
    fronts = [json.loads(file.read_text()) for file in media.rglob("front_*.table.json")]
    assert sorted(len(table["data"]) for table in fronts) == [1, 2, 3]
    assert len(list(media.rglob("picture_*.png"))) == 3

    with (tmp_path / "run" / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    shares = [k for k in rows[0] if k.startswith("throughput/share_")]
    assert sorted(shares) == [f"throughput/share_{x}" for x in ("forward", "generation", "learning", "scoring")]
    sums = [sum(float(row[share]) for share in shares) for row in rows if row[shares[0]]]
    assert sums == pytest.approx([1.0] * len(sums))
    assert len(sums) == 3  # an interval is known when the next one begins
    assert [row["step"] for row in rows if row["weights/good"]] == ["0", "1", "2", "3"]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["combiner"] == "PAMA"
    assert set(summary["objectives"]) == {"good", "length"}
    assert summary["tokens_per_second"] > 0
