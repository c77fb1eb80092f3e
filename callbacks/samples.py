"""Samples of every evaluation, to read."""

import json
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor

from moa_lightning.callbacks.evaluations import EvaluationCallback, step_of
from moa_lightning.callbacks.growing_file import drop_cut_line
from moa_lightning.callbacks.writing import Writing
from moa_lightning.errors import UserError
from moa_lightning.types import Evaluation, Statistics


def lines_of(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Prompt, completion, raw scores (null where an objective had none), length and truncation of each response.

    Objectives whose value is not the raw score have their ``values`` as well.
    """
    responses, rewards = evaluation.responses, evaluation.rewards
    transformed = rewards.transform_by_name
    return [
        {
            "prompt": responses.prompts[i],
            "completion": responses.completions[i],
            "scores": _by_name(rewards.names, rewards.raw_BN[i]),
            **({"values": _by_name(rewards.names, rewards.value_BN[i], transformed)} if transformed else {}),
            "length": int(responses.lengths_B[i]),
            "truncated": bool(responses.truncated_B[i]),
        }
        for i in range(len(responses.completions))
    ]


def _by_name(names: tuple[str, ...], numbers_N: Tensor, chosen: Collection[str] | None = None) -> dict[str, Any]:
    return {
        name: None if math.isnan(number) else number
        for name, number in zip(names, numbers_N.tolist(), strict=True)
        if chosen is None or name in chosen
    }


class SampleTable(EvaluationCallback):
    """Appends the first responses of each evaluation to ``samples.jsonl``, and logs them as a wandb table.

    The prompts and the random numbers are the same at every evaluation, so the lines of one prompt show how its
    response changes. Only the main process writes; what is in the file stays there.

    Args:
        rows: responses per evaluation; 0 writes none.
    """

    def __init__(self, rows: int = 8) -> None:
        super().__init__()
        if rows < 0:
            raise UserError(f"sample_table.rows must be at least 0, got {rows}")
        self.rows, self._writing = rows, Writing()

    def on_evaluation(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        statistics: dict[str, Statistics],
        batches: list[Evaluation],
    ) -> None:
        """Write the samples."""
        if not trainer.is_global_zero or not self.rows:
            return
        samples = [line for batch in batches for line in lines_of(batch)][: self.rows]
        step = step_of(trainer, pl_module)
        file = Path(trainer.default_root_dir) / "samples.jsonl"
        with self._writing.attempt(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            drop_cut_line(file)
            with file.open("a", encoding="utf-8") as opened:
                for sample in samples:
                    opened.write(json.dumps({"step": step, **sample}, ensure_ascii=False) + "\n")
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                _log_wandb(logger, step, samples)


def _log_wandb(logger: WandbLogger, step: int, samples: list[dict[str, Any]]) -> None:
    import wandb

    raw, values = list(samples[0]["scores"]), list(samples[0].get("values", {}))
    scores = [*(f"rewards/{name}" for name in raw), *(f"values/{name}" for name in values)]
    columns: list[str | int] = ["step", "prompt", "completion", *scores, "length", "truncated"]
    rows = [
        [step, s["prompt"], s["completion"]]
        + [s["scores"][name] for name in raw]
        + [s["values"][name] for name in values]
        + [s["length"], s["truncated"]]
        for s in samples
    ]
    table = wandb.Table(columns=columns, data=rows)  # prefixes, since an objective may be called "length"
    logger.experiment.log({"samples": table, "trainer/global_step": step})
