"""What a run writes beside the front: samples, metrics, predictions, the summary and the policy."""

import csv
import json
import math
import os
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger

from moa_lightning.callbacks import (
    MetricsBeforeCheckpoints,
    MetricsFile,
    ObjectiveMetrics,
    ParetoFront,
    PredictionWriter,
    RunFiles,
    SampleTable,
    Throughput,
)
from moa_lightning.callbacks.growing_file import drop_cut_line
from tests.callbacks.scripted import Scripted, around, evaluation, experience, trainer


def script(*means, **options):
    return Scripted([evaluation(around(*point)) for point in means], **options)


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def table(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


class Stop(Callback):
    """Ends a run from within, at a step."""

    def __init__(self, step, error):
        self.step, self.error = step, error
        self.summary = None  # as it lay there just before

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            file = Path(trainer.default_root_dir) / "summary.json"
            self.summary = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
            raise self.error


# Samples


def test_samples_are_appended_and_never_rewritten(tmp_path):
    file = tmp_path / "samples.jsonl"
    file.write_text("what was there\n", encoding="utf-8")
    running = trainer(tmp_path, SampleTable(rows=3), max_steps=2)
    running.fit(script((0, 0), (1, 1), (2, 2)))
    before = file.read_text(encoding="utf-8")
    running.save_checkpoint(tmp_path / "end.ckpt")
    trainer(tmp_path, SampleTable(rows=2), max_steps=3).fit(
        script((3, 3)), ckpt_path=tmp_path / "end.ckpt", weights_only=True
    )
    after = file.read_text(encoding="utf-8")
    assert before.startswith("what was there\n{")
    assert after.startswith(before)
    samples = [json.loads(line) for line in after.splitlines()[1:]]
    assert [(s["step"], s["prompt"]) for s in samples] == [
        *((step, f"prompt {i}") for step in (0, 1, 2) for i in range(3)),
        (3, "prompt 0"),
        (3, "prompt 1"),
    ]


def test_a_sample_line(tmp_path):
    raw_BN = torch.tensor([[1.5, torch.nan], [2.0, 3.0]])
    trainer(tmp_path, SampleTable(), max_steps=1).fit(Scripted([evaluation(raw_BN), evaluation(raw_BN)]))
    assert lines(tmp_path / "samples.jsonl")[:2] == [
        {
            "step": 0,
            "prompt": "prompt 0",
            "completion": "fine été 0",
            "scores": {"good": 1.5, "short": None},
            "length": 1,
            "truncated": False,
        },
        {
            "step": 0,
            "prompt": "prompt 1",
            "completion": "fine été 1",
            "scores": {"good": 2.0, "short": 3.0},
            "length": 3,
            "truncated": True,
        },
    ]
    assert "été" in (tmp_path / "samples.jsonl").read_text(encoding="utf-8")


def test_a_sample_of_a_cost_has_its_value_too(tmp_path):
    raw_BN = torch.tensor([[1.5, torch.nan], [2.0, 3.0]])
    moa = Scripted([evaluation(raw_BN, scales=[1.0, -2.0])] * 2)
    trainer(tmp_path, SampleTable(), max_steps=1).fit(moa)
    first, second = lines(tmp_path / "samples.jsonl")[:2]
    assert (first["scores"], first["values"]) == ({"good": 1.5, "short": None}, {"short": None})
    assert (second["scores"], second["values"]) == ({"good": 2.0, "short": 3.0}, {"short": -6.0})


def test_samples_may_be_switched_off(tmp_path):
    trainer(tmp_path, SampleTable(rows=0), max_steps=1).fit(script((0, 0), (1, 1)))
    assert not (tmp_path / "samples.jsonl").exists()
    with pytest.raises(ValueError, match=r"sample_table\.rows must be at least 0, got -1"):
        SampleTable(rows=-1)


# Metrics


def test_a_metric_that_appears_later_widens_the_file(tmp_path):
    log = MetricsFile(str(tmp_path / "new"))
    log.log_metrics({"loss": 1.0}, step=0)
    log.save()  # Lightning does so after each group of metrics; the step's row goes on
    log.log_metrics({"kl": 0.5}, step=0)
    log.log_metrics({"loss": 0.5, "a, b": 7.0}, step=1)
    log.finalize("success")
    assert table(log.path) == [
        {"step": "0", "loss": "1.0", "kl": "0.5", "a, b": ""},
        {"step": "1", "loss": "0.5", "kl": "", "a, b": "7.0"},
    ]
    assert not list(log.path.parent.glob(".metrics*"))


def test_a_resumed_run_appends_its_metrics(tmp_path):
    first = MetricsFile(str(tmp_path))
    first.log_metrics({"loss": 1.0, "kl": 0.5}, step=3)
    first.finalize("success")
    before = first.path.read_text(encoding="utf-8")
    second = MetricsFile(str(tmp_path))
    second.log_metrics({"kl": 0.25}, step=4)  # fewer columns and another order than the file has
    second.log_metrics({"kl": 0.125, "loss": 0.5}, step=5)
    assert second.path.read_text(encoding="utf-8").startswith(before)
    second.log_metrics({"later": 9.0}, step=6)
    second.finalize("success")
    second.finalize("success")
    assert table(second.path) == [
        {"step": "3", "loss": "1.0", "kl": "0.5", "later": ""},
        {"step": "4", "loss": "", "kl": "0.25", "later": ""},
        {"step": "5", "loss": "0.5", "kl": "0.125", "later": ""},
        {"step": "6", "loss": "", "kl": "", "later": "9.0"},
    ]


@pytest.mark.parametrize(
    ("interval", "stop", "volumes"), [(1, 2, ["1.0", "2.0", "4.0"]), (2, 3, ["1.0", "2.0"])], ids=["each", "second"]
)
def test_metrics_of_a_run_that_breaks_off(tmp_path, interval, stop, volumes):
    """Each evaluation's volume is there, the one before training included; each update is in one row."""
    log = MetricsFile(str(tmp_path))
    front = ParetoFront({"good": 0.0, "short": 0.0})
    moa = script((1, 1), (1, 2), (2, 2), collected=[experience(torch.zeros(4, 2))] * 4, terms={"clip_ratio": 0.5})
    watchers = [ObjectiveMetrics(), front, Stop(stop, RuntimeError("stop"))]
    with pytest.raises(RuntimeError, match="stop"):
        trainer(tmp_path, *watchers, logger=log, max_steps=4, val_check_interval=interval).fit(moa)
    rows = table(log.path)
    assert [row["pareto/hypervolume"] for row in rows if row["pareto/hypervolume"]] == volumes
    assert [row["step"] for row in rows if row["clip_ratio"]] == [str(i) for i in range(stop)]


# Summary and policy


def test_the_summary(tmp_path):
    seed_everything(11, verbose=False)
    raw_BN = torch.tensor([[1.0, 5.0], [3.0, torch.nan], [5.0, 7.0]])
    seconds = {"generation": 2.0, "scoring": 1.0, "forward": 1.0}
    moa = Scripted(
        [evaluation(around(0.0, 0.0)), evaluation(raw_BN)], collected=[experience(torch.zeros(4, 2), seconds=seconds)]
    )
    watchers = [Throughput(), ParetoFront({"good": -1.0, "short": -1.0}), RunFiles()]
    trainer(tmp_path, *watchers, max_steps=1).fit(moa)
    summary = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert summary["combiner"] == "Equal"
    assert summary["steps"] == 1
    assert (summary["seed"], summary["data_seed"], summary["model_seed"]) == (11, None, 11)
    assert 0 < summary["seconds"] < 600
    assert 0 < summary["tokens_per_second"] <= 12 / 4  # four responses of three tokens, four seconds beside learning
    start_std_error = pytest.approx(1 / math.sqrt(3) / 2)
    assert summary["objectives"] == {
        "good": {
            "start": 0.0,
            "end": 3.0,
            "std_error": pytest.approx(2 / math.sqrt(3)),
            "start_std_error": start_std_error,
            "transform": "",
        },
        "short": {
            "start": 0.0,
            "end": 6.0,
            "std_error": pytest.approx(1.0),  # standard deviation sqrt(2) of two responses
            "start_std_error": start_std_error,
            "transform": "",
        },
    }
    assert summary["hypervolume"] == {"start": 1.0, "end": 28.0, "reference": {"good": -1.0, "short": -1.0}}
    assert (tmp_path / "policy" / "config.json").is_file()
    assert not (tmp_path / ".summary.json").exists()


def test_the_summary_of_a_cost_is_of_its_values(tmp_path):
    """The raw means stand beside them; a single response has no standard error."""
    alone = torch.tensor([[1.0, 3.0], [3.0, torch.nan]])
    moa = Scripted([evaluation(raw_BN, scales=[1.0, -2.0]) for raw_BN in (around(0.0, 0.5), alone)])
    trainer(tmp_path, RunFiles(save_policy=False), max_steps=1).fit(moa)
    error = 1 / math.sqrt(3) / 2
    assert json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))["objectives"]["short"] == {
        "start": -1.0,
        "end": -6.0,
        "std_error": None,
        "start_std_error": pytest.approx(2 * error),
        "transform": "-2 x raw",
        "raw_start": 0.5,
        "raw_end": 3.0,
        "raw_std_error": None,
        "raw_start_std_error": pytest.approx(error),
    }


def test_raw_means_of_an_old_checkpoint_are_not_taken_for_values(tmp_path):
    def objectives(scales=()):
        files = RunFiles(save_policy=False)
        files.load_state_dict({"first": {"good": [9.0, 0.1], "short": [9.0, 0.1]}, "last": {}, "seconds": 1.0})
        moa = Scripted([evaluation(around(1.0, 2.0), scales=scales)] * 2)
        trainer(tmp_path, files, max_steps=1).fit(moa)
        return json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))["objectives"]

    with_cost = objectives([1.0, -1.0])
    assert [with_cost[name]["start"] for name in ("good", "short")] == [9.0, -2.0]
    assert [numbers["start"] for numbers in objectives().values()] == [9.0, 9.0]  # without a scale they are values

    files = RunFiles(save_policy=False)  # stopped before its first evaluation: what is left says that it is of old
    files.load_state_dict({"first": {}, "last": {"good": [9.0, 0.1]}, "seconds": 1.0})
    running = trainer(tmp_path, files, Stop(0, RuntimeError("stop")), num_sanity_val_steps=0)
    with pytest.raises(RuntimeError, match="stop"):
        running.fit(script((0, 0)))
    left = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))["objectives"]
    assert left == {"good": {"start": 9.0, "end": 9.0, "std_error": 0.1, "start_std_error": 0.1}}


@pytest.mark.parametrize(("error", "raised"), [(RuntimeError("stop"), RuntimeError), (KeyboardInterrupt(), SystemExit)])
def test_a_run_that_breaks_off_leaves_its_summary_and_no_policy(tmp_path, error, raised):
    watchers = [ParetoFront({"good": 0.0, "short": 0.0}), RunFiles(), Stop(3, error)]
    running = trainer(tmp_path, *watchers, val_check_interval=2, max_steps=5)
    moa = script((1, 1), (2, 2), collected=[experience(torch.zeros(4, 2))] * 4)
    with pytest.raises(raised):
        running.fit(moa)
    summary = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert summary["steps"] == 3
    assert summary["objectives"]["good"]["end"] == 2.0
    assert summary["hypervolume"]["end"] == 4.0
    evaluated = watchers[-1].summary  # written by the evaluation, so that a run that is killed has it too
    assert evaluated["steps"] == 2
    assert evaluated["hypervolume"] == summary["hypervolume"]
    assert not (tmp_path / "policy").exists()


def test_the_summary_of_a_resumed_run_tells_of_the_whole(tmp_path):
    first = trainer(tmp_path, ParetoFront({"good": 0.0, "short": 0.0}), RunFiles(save_policy=False), max_steps=1)
    first.fit(script((1, 1), (2, 2)))
    first.save_checkpoint(tmp_path / "half.ckpt")
    saved = torch.load(tmp_path / "half.ckpt", weights_only=True)["callbacks"]["RunFiles"]
    trainer(tmp_path, ParetoFront({"good": 0.0, "short": 0.0}), RunFiles(save_policy=False), max_steps=2).fit(
        script((3, 1)), ckpt_path=tmp_path / "half.ckpt", weights_only=True
    )
    summary = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert summary["steps"] == 2
    assert summary["seconds"] > saved["seconds"] > 0
    assert [summary["objectives"]["good"][key] for key in ("start", "end")] == [1.0, 3.0]
    assert summary["hypervolume"] == {"start": 1.0, "end": 5.0, "reference": {"good": 0.0, "short": 0.0}}
    assert not (tmp_path / "policy").exists()


def test_without_front_and_throughput_the_summary_says_null(tmp_path):
    trainer(tmp_path, RunFiles(), max_steps=1).fit(script((1, 1), (2, 2)))
    summary = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert summary["hypervolume"] is None
    assert summary["tokens_per_second"] is None


# Predictions


class Predicting(Scripted):
    def predict_dataloader(self):
        return self.val_dataloader()

    def predict_step(self, batch, batch_idx):
        self._shown = 0
        return self.validation_step(batch, batch_idx)


@pytest.mark.parametrize("path", [None, "elsewhere/answers.jsonl"])
def test_predictions(tmp_path, path):
    raw_BN = around(1.0, 2.0)
    raw_BN[1, 1] = torch.nan
    writer = PredictionWriter(path and str(tmp_path / path))
    running = trainer(tmp_path / "run", writer)
    running.predict(Predicting([evaluation(raw_BN)]), return_predictions=False)
    file = tmp_path / path if path else tmp_path / "run" / "predictions.jsonl"
    written = lines(file)
    assert [line["prompt"] for line in written] == [f"prompt {i}" for i in range(4)]
    assert [line["columns"] for line in written] == [{"source": i} for i in range(4)]
    assert [line["scores"] for line in written[:2]] == [{"good": 1.5, "short": 2.5}, {"good": 0.5, "short": None}]
    assert [(line["length"], line["truncated"]) for line in written[:2]] == [(1, False), (3, True)]
    with pytest.raises(ValueError, match=r"exists already; remove it, or set --predictions\.path"):
        running.predict(Predicting([evaluation(raw_BN)]), return_predictions=False)
    assert lines(file) == written


# Killed


def test_the_rows_of_all_steps_are_on_the_disk_before_a_checkpoint_is(tmp_path):
    """A run that is killed resumes after its checkpoint, so what the checkpoint has seen must not wait in memory."""

    class Look(TorchCheckpointIO):
        seen: ClassVar = []

        def save_checkpoint(self, checkpoint, path, storage_options=None):
            rows = table(tmp_path / "metrics.csv")
            self.seen.append((checkpoint["global_step"], sum(1 for row in rows if row["clip_ratio"])))

    log, other = MetricsFile(str(tmp_path)), Logged()
    by_step = ModelCheckpoint(tmp_path / "a", every_n_train_steps=1, save_top_k=-1)
    evaluated = ModelCheckpoint(tmp_path / "b", save_top_k=-1)
    moa = script((1, 1), (2, 2), (3, 3), collected=[experience(torch.zeros(4, 2))] * 4, terms={"clip_ratio": 0.5})
    trainer(
        tmp_path, ObjectiveMetrics(), MetricsBeforeCheckpoints(), by_step, evaluated,
        logger=[log, other], max_steps=4, val_check_interval=2, enable_checkpointing=True, plugins=[Look()],
    ).fit(moa)  # fmt: skip
    assert sorted(Look.seen) == [(1, 1), (2, 2), (2, 2), (3, 3), (4, 4), (4, 4)]
    rows = table(log.path)
    assert [row["step"] for row in rows if row["clip_ratio"]] == ["0", "1", "2", "3"]  # each of them once
    assert other.steps == [0, 1, 2, 3]


class Logged(Logger):
    """Another logger, which is to hear of each step once."""

    name, version = "other", "0"

    def __init__(self):
        super().__init__()
        self.steps = []

    def log_metrics(self, metrics, step=None):
        if "clip_ratio" in metrics:
            self.steps.append(step)

    def log_hyperparams(self, *args, **kwargs):
        pass


def test_the_same_metric_of_another_step_is_another_row(tmp_path):
    log = MetricsFile(str(tmp_path))
    log.log_metrics({"loss": 1.0, "kl": float("nan")}, step=0)
    log.flush()
    log.log_metrics({"loss": 1.0, "kl": float("nan"), "epoch": 0}, step=0)  # Lightning logs after the checkpoint
    log.log_metrics({"later": 2.0}, step=0)
    log.log_metrics({"loss": 1.0, "kl": float("nan")}, step=1)
    log.finalize("success")
    assert [(row["step"], row["loss"], row["kl"], row["later"]) for row in table(log.path)] == [
        ("0", "1.0", "nan", ""),
        ("0", "", "", "2.0"),
        ("1", "1.0", "nan", ""),
    ]


@pytest.mark.parametrize("cut", [1, 2, 7])
def test_a_row_that_a_kill_cut_is_dropped(tmp_path, cut):
    first = MetricsFile(str(tmp_path))
    for step in range(3):
        first.log_metrics({"loss": step + 0.5}, step=step)
    first.finalize("success")
    os.truncate(first.path, first.path.stat().st_size - cut)
    second = MetricsFile(str(tmp_path))
    second.log_metrics({"loss": 2.5}, step=2)
    second.finalize("success")
    assert [(row["step"], row["loss"]) for row in table(first.path)] == [("0", "0.5"), ("1", "1.5"), ("2", "2.5")]


@pytest.mark.parametrize(
    ("there", "left"),
    [
        (b"", b""),
        (b"cut", b""),
        (b"a\nb\n", b"a\nb\n"),
        (b"a\n" + b"x" * 200_000, b"a\n"),
        (b"y" * 70_000 + b"\nx", b"y" * 70_000 + b"\n"),
    ],
    ids=["empty", "one", "whole", "long", "blocks"],
)
def test_a_cut_line_is_dropped(tmp_path, there, left):
    file = tmp_path / "file"
    drop_cut_line(file)
    assert not file.exists()
    file.write_bytes(there)
    drop_cut_line(file)
    assert file.read_bytes() == left


def test_a_sample_that_a_kill_cut_is_dropped(tmp_path):
    file = tmp_path / "samples.jsonl"
    file.write_text('{"step": 0}\n{"step": 1, "prom', encoding="utf-8")
    trainer(tmp_path, SampleTable(rows=1), max_steps=1).fit(script((0, 0), (1, 1)))
    assert [line["step"] for line in lines(file)] == [0, 0, 1]
