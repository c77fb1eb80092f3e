"""A real run with every callback, watched by Weights & Biases offline."""

import csv
import json
import struct
import time

import pytest
from lightning.pytorch.loggers import WandbLogger
from wandb.proto.wandb_internal_pb2 import Record

from moa_lightning.callbacks import (
    MetricsFile,
    ObjectiveMetrics,
    ObjectiveProgressBar,
    ParetoFront,
    RunFiles,
    SampleTable,
    Throughput,
)
from tests.helpers import tiny
from tests.test_module import FilmPrompts, module, trainer


def records_of(file):
    """The records of an offline file; nothing in wandb reads one back without its server.

    A file is a header of seven bytes, then blocks of 32 KiB with records: check sum, length, type (whole, first,
    middle or last part of a record).
    """
    content, position, parts, found = file.read_bytes(), 7, b"", []
    while position + 7 <= len(content):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        length, kind = struct.unpack_from("<HB", content, position + 4)
        parts += content[position + 7 : position + 7 + length]
        position += 7 + length
        if position > len(content):
            break  # it is still being written
        if kind in (1, 4):  # whole, or last part
            found.append(Record.FromString(parts))
            parts = b""
    return found


def history_of(file):
    """Each dictionary that was logged, with its ``trainer/global_step``, once wandb's service has written the end."""
    deadline = time.monotonic() + 30
    while not [r for r in records_of(file) if r.WhichOneof("record_type") == "exit"]:
        assert time.monotonic() < deadline, "the file has no end"
        time.sleep(0.05)
    histories = [record.history.item for record in records_of(file)]
    logged = [{"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items} for items in histories]
    return [(metrics["trainer/global_step"], metrics) for metrics in logged if metrics]


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

    (tracked,) = (tmp_path / "tracking").glob("wandb/offline-run-*/*.wandb")
    history = history_of(tracked)
    for key in ("val/rewards/good/mean", "val/rewards/length/mean", "val/values/length/mean", "pareto/hypervolume"):
        assert [step for step, logged in history if key in logged] == [0, 2, 4], key
    for key in ("samples", "pareto/picture"):  # files are logged as their parts
        assert [step for step, logged in history if f"{key}/path" in logged] == [0, 2, 4], key
    assert [step for step, logged in history if "loss" in logged] == [0, 1, 2, 3]
    assert not [logged for _, logged in history if "val/values/good/mean" in logged]  # the value is the raw score
    doubled = [
        logged["val/values/length/mean"] / logged["val/rewards/length/mean"]
        for _, logged in history
        if "val/values/length/mean" in logged
    ]
    assert doubled == pytest.approx([2.0] * 3)  # the objective's scale

    (media,) = (tmp_path / "tracking").glob("wandb/offline-run-*/files/media")
    samples = [json.loads(file.read_text()) for file in sorted(media.rglob("samples_*.table.json"))]
    rewards = ["rewards/good", "rewards/length"]
    assert len(samples) == 3  # at 0, 2 and 4 steps
    columns = ["step", "prompt", "completion", *rewards, "values/length", "length", "truncated"]
    assert samples[0]["columns"] == columns
    assert sorted([row[0] for row in table["data"]] for table in samples) == [[step] * 3 for step in (0, 2, 4)]
    for row in samples[0]["data"]:
        assert row[columns.index("values/length")] == 2 * row[columns.index("rewards/length")]
    assert all(len(table["data"]) == 3 for table in samples)
    fronts = [json.loads(file.read_text()) for file in media.rglob("front_*.table.json")]
    assert sorted(len(table["data"]) for table in fronts) == [1, 2, 3]
    assert all(table["columns"] == ["step", "non_dominated", "good", "length", "length_raw"] for table in fronts)
    whole = max((table["data"] for table in fronts), key=len)
    assert [row[0] for row in whole] == [0, 2, 4]
    assert [row[3] for row in whole] == pytest.approx([2 * row[4] for row in whole])
    assert len(list(media.rglob("picture_*.png"))) == 3

    with (tmp_path / "run" / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    shares = [k for k in rows[0] if k.startswith("throughput/share_")]
    assert sorted(shares) == [f"throughput/share_{x}" for x in ("forward", "generation", "learning", "scoring")]
    sums = [sum(float(row[share]) for share in shares) for row in rows if row[shares[0]]]
    assert sums == pytest.approx([1.0] * len(sums))
    assert len(sums) == 3  # an interval is known when the next one begins
    assert [row["step"] for row in rows if row["weights/good"]] == ["0", "1", "2", "3"]
    for key in ("val/rewards/good/mean", "val/values/length/mean", "pareto/hypervolume"):
        assert [row["step"] for row in rows if row[key]] == ["0", "2", "4"], key
    with (tmp_path / "run" / "front.csv").open(newline="") as file:
        front = list(csv.DictReader(file))
    assert [row["step"] for row in front] == ["0", "2", "4"]
    evaluated = [row for row in rows if row["val/rewards/good/mean"]]
    for name, column in {"rewards/good": "good", "values/length": "length", "rewards/length": "length_raw"}.items():
        logged = [float(row[f"val/{name}/mean"]) for row in evaluated]
        assert logged == pytest.approx([float(row[column]) for row in front], rel=1e-6)
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert steps == [0] * 3 + [2] * 3 + [4] * 3
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["combiner"] == "PAMA"
    assert set(summary["objectives"]) == {"good", "length"}
    assert summary["tokens_per_second"] > 0
