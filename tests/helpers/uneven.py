"""Evaluations of a few prompts in one process or in two, for tests that compare them."""

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

from lightning.pytorch import Trainer, seed_everything

from moa_lightning.callbacks import EvaluationCallback, ParetoFront, PredictionWriter, SampleTable
from moa_lightning.data import PromptData
from moa_lightning.data.base import Stage
from moa_lightning.distributed import all_objects
from moa_lightning.models import Policy
from tests.helpers import pairs, processes


class Few(PromptData):
    """So many rows at every stage."""

    def __init__(self, rows: list[dict[str, Any]], **settings: Any) -> None:
        super().__init__(**settings)
        self.given = rows

    def rows(self, stage: Any) -> list[dict[str, Any]]:
        return self.given


class Seen(EvaluationCallback):
    """How many responses were evaluated, in the statistics and on all processes' batches."""

    def on_evaluation(self, trainer, pl_module, statistics, batches) -> None:
        counted = sum(len(batch.kl_B) for batch in batches)
        self.found = {
            "counted": statistics["short"].count,
            "batches": all_objects(len(batches)),
            "rows": all_objects(counted),
        }


def evaluate(strategy: str, case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Metrics of validation and test, what callbacks saw, and the files' lines; ``one`` is a single process."""
    seed_everything(0, verbose=False)
    alone, seen, front = strategy == "one", Seen(), ParetoFront({"good": -9.0, "short": -9.0})
    root = folder / f"evaluated-{strategy}-{case['count']}-{bool(case.get('offline'))}-{case.get('scripted', True)}"
    if case.get("offline"):
        rows = pairs.data(folder / "data.jsonl", val_size=1).rows(Stage.TRAIN)
        front.reference = {"good": -9.0, "kind": -9.0, "short": -9.0}
    else:
        rows = [{"prompt": text} for text in pairs.PROMPTS]
    trainer = Trainer(
        default_root_dir=root,
        accelerator="cpu",
        devices=1 if alone else 2,
        strategy="auto" if alone else processes.STRATEGIES[strategy](),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[seen, front, SampleTable(), PredictionWriter()],
    )
    moa, data = processes.module(case, folder), Few(rows[: case["count"]], batch_size=2)
    with patch.object(Policy, "generate", processes.scripted if case.get("scripted", True) else Policy.generate):
        (validated,) = trainer.validate(moa, data, verbose=False)
        (tested,) = trainer.test(moa, data, verbose=False)
        trainer.predict(moa, data, return_predictions=False)
    return {
        "validated": validated,
        "tested": tested,
        "seen": seen.found,
        "front": front.points,
        "samples": _prompts(root / "samples.jsonl"),
        "predictions": sorted(line for file in root.glob("predictions*.jsonl") for line in _prompts(file)),
    }


def _prompts(file: Path) -> list[str]:
    return [json.loads(line)["prompt"] for line in file.read_text().splitlines()]
