"""What a run leaves: the summary and the policy."""

import json
import math
import os
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from moa_lightning.callbacks.constraints import Constraints, thresholds_by_unit
from moa_lightning.callbacks.evaluations import EvaluationCallback, step_of
from moa_lightning.callbacks.pareto_front import ParetoFront
from moa_lightning.callbacks.rewards import combiner_report
from moa_lightning.callbacks.throughput import Throughput
from moa_lightning.callbacks.writing import Writing
from moa_lightning.distributed import raise_on_all_ranks
from moa_lightning.types import Evaluation, Statistics
from moa_lightning.utils.atomic_file import atomic_file
from moa_lightning.utils.random_state import run_seed

Mean = dict[str, Any]
"""Of one objective in one evaluation: ``mean``, ``std_error``, ``raw_mean``, ``raw_std_error``, ``transform``.

``transform`` is None in what an old checkpoint holds: raw means alone.
"""


class RunFiles(EvaluationCallback):
    """Writes ``summary.json`` after each evaluation and at the end, and the policy at the end of training.

    The policy lies in ``policy/`` in Hugging Face format: the adapter alone when there is one. The summary is there
    also when a run is interrupted or fails: it holds what was reached. Its numbers are means of values, after an
    objective's scale, shift and clip, with the raw means beside them where they differ; see :func:`start_and_end`.

    Args:
        save_policy: write the policy.
    """

    def __init__(self, save_policy: bool = True) -> None:
        super().__init__()
        self.save_policy, self._writing = save_policy, Writing()
        self._first: dict[str, Mean] = {}
        self._last: dict[str, Mean] = {}
        self._seconds_before = 0.0  # of the run that this one resumes
        self._rate: float | None = None  # tokens per second, of this run or the one before
        self._started: float | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._started = time.perf_counter()

    def on_evaluation(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        statistics: dict[str, Statistics],
        batches: list[Evaluation],
    ) -> None:
        """Keep the means."""
        self._last = {
            name: {
                "mean": s.mean,
                "std_error": s.std_error,
                "raw_mean": s.raw_mean,
                "raw_std_error": s.raw_std_error,
                "transform": s.transform,
            }
            for name, s in statistics.items()
            if s.count
        }
        for name, now in self._last.items():
            first = self._first.get(name, now)
            # An old checkpoint, or one of another scale, holds a mean in another unit: then the run starts here.
            self._first[name] = first if (first["transform"] or "") == now["transform"] else now

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the summary, now that all callbacks have seen the evaluation."""
        self._write(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the policy and the summary; the clock stops."""
        self._seconds_before, self._started = self._seconds(), None
        if self.save_policy:  # by every rank: shards are gathered
            policy: Any = pl_module.policy
            with raise_on_all_ranks():  # rank 0 writes, and the others continue to the next collective
                policy.save_pretrained(Path(trainer.default_root_dir) / "policy", _record(trainer, pl_module))
        self._write(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write what was reached; what keeps that from being written must not hide the error."""
        try:
            self._write(trainer, pl_module)
        except Exception as error:  # noqa: BLE001  # the first error is the one to see
            rank_zero_warn(f"summary.json was not written: {type(error).__name__}: {error}")

    def _seconds(self) -> float:
        return self._seconds_before + (time.perf_counter() - self._started if self._started is not None else 0.0)

    def _write(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero or not self._last:
            return
        summary = {
            "combiner": type(pl_module.combiner).__name__,
            "steps": step_of(trainer, pl_module),
            "seconds": self._seconds(),
            "tokens_per_second": self._tokens_per_second(trainer),
            **_seeds(trainer, pl_module),
            "objectives": start_and_end(self._first, self._last),
            "hypervolume": _hypervolume(trainer),
            **_report(pl_module),
            **_constraints(trainer),
        }
        root = Path(trainer.default_root_dir)
        with self._writing.attempt(root / "summary.json"):
            root.mkdir(parents=True, exist_ok=True)
            with atomic_file(root / "summary.json") as scratch:
                scratch.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")

    def _tokens_per_second(self, trainer: Trainer) -> float | None:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]  # set, not declared
            if isinstance(callback, Throughput) and callback.total_seconds > 0:
                self._rate = callback.total_tokens / callback.total_seconds
        return self._rate

    def state_dict(self) -> dict[str, Any]:
        """The first and last evaluation, and the seconds so far."""
        return {"first": self._first, "last": self._last, "seconds": self._seconds(), "rate": self._rate}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from there."""
        self._first, self._last = saved_means(state_dict["first"]), saved_means(state_dict["last"])
        self._seconds_before, self._rate = state_dict["seconds"], state_dict.get("rate")


def start_and_end(first: dict[str, Mean], last: dict[str, Mean]) -> dict[str, dict[str, Any]]:
    """The first and the last evaluation by objective, as ``summary.json`` has them.

    ``start``, ``end`` and their standard errors are of values; ``transform`` says how these follow from raw scores,
    and is empty where they are the same. Where they are not, ``raw_start``, ``raw_end`` and their standard errors
    stand beside them. A standard error that is not known is null. Means of an old checkpoint have no ``transform``:
    they are of raw scores.
    """
    objectives: dict[str, dict[str, Any]] = {}
    for name, end in last.items():
        start = first.get(name, end)
        objectives[name] = {
            "start": start["mean"],
            "end": end["mean"],
            "std_error": _or_none(end["std_error"]),
            "start_std_error": _or_none(start["std_error"]),
        }
        if end["transform"] is not None:
            objectives[name]["transform"] = end["transform"]
        if end["transform"]:
            objectives[name] |= {
                "raw_start": start["raw_mean"],
                "raw_end": end["raw_mean"],
                "raw_std_error": _or_none(end["raw_std_error"]),
                "raw_start_std_error": _or_none(start["raw_std_error"]),
            }
    return objectives


def _or_none(number: float) -> float | None:
    return None if math.isnan(number) else number  # JSON has no NaN


def saved_means(saved: dict[str, Any]) -> dict[str, Mean]:
    """Means as a checkpoint holds them; in an old one each is the raw mean and its standard error."""
    keys = ("mean", "std_error", "transform")
    return {
        name: dict(zip(keys, (*mean, None), strict=True)) if isinstance(mean, list) else mean
        for name, mean in saved.items()
    }


def _record(trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
    """What the policy's folder says of it. The summary may be of a later step: a resumed run writes it first."""
    module: Any = pl_module
    return {"steps": trainer.global_step, "combiner": type(module.combiner).__name__}


def _seeds(trainer: Trainer, pl_module: LightningModule) -> dict[str, int | None]:
    """The seeds in force, by what they are of; ``None`` where nothing was seeded."""
    module: Any = pl_module
    data = getattr(trainer, "datamodule", None)
    return {
        "seed": run_seed() if "PL_GLOBAL_SEED" in os.environ else None,
        "data_seed": None if data is None else run_seed(getattr(data, "seed", None)),
        "model_seed": run_seed(module.seed),
    }


def _report(pl_module: LightningModule) -> dict[str, Any]:
    """What the combiner reports; thresholds under another name where evaluations are in another unit."""
    report: dict[str, Any] = combiner_report(pl_module)
    inside, outside = thresholds_by_unit(pl_module)
    if outside:
        del report["thresholds"]
        report |= ({"thresholds": inside} if inside else {}) | {"training_thresholds": outside}
    return report


def _constraints(trainer: Trainer) -> dict[str, Any]:
    """How thresholds held, where there are any."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # set, not declared
        if isinstance(callback, Constraints):
            return callback.report()
    return {}


def _hypervolume(trainer: Trainer) -> dict[str, Any] | None:
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # set, not declared
        if isinstance(callback, ParetoFront) and callback.points:
            return {
                "start": callback.hypervolume(1),
                "end": callback.hypervolume(),
                "reference": callback.reference,
            }
    return None
