"""How well a run holds its thresholds, and the best policy that meets them.

Legend: M constrained objectives.
"""

import math
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn

from moa_lightning.callbacks.evaluations import EvaluationCallback, log_everywhere, step_of
from moa_lightning.callbacks.rewards import combiner_report
from moa_lightning.functional.verdict import Z
from moa_lightning.signals import Signal
from moa_lightning.types import Evaluation, Minibatch, Statistics

BEST = "best.ckpt"
"""Name of the best checkpoint, in the folder of the run's checkpoints."""


class Constraints(EvaluationCallback):
    """Records how long each threshold held and how far its multiplier moved; keeps the best checkpoint.

    Of thresholds in the unit of evaluations. It leaves out a threshold on the win probability among the responses to a
    prompt, which no evaluation measures. After each evaluation:
    ``thresholds_held/<name>``, the share of the last half of the evaluations whose mean was at or above the threshold
    or within its 95 % interval of it, and ``duals_range/<name>``, the largest less the smallest multiplier over the
    last quarter of the collected batches. ``summary.json`` and the closing table have the same at the end.

    The best checkpoint is ``best.ckpt`` beside the others. Of the evaluations in which all held-out means reach their
    thresholds it is the one with the highest mean of the primary objective. Before there is such an evaluation, it is
    the one with the smallest violation, the largest over the thresholds, in standard deviations between responses.
    A mean that reaches its threshold is no proof: the best of many evaluations lies too high. The closing table says
    ``met`` only where the whole 95 % interval lies above. Where thresholds have changed since (adaptive ones, or a run
    resumed with others), its means are judged again by the present thresholds before the comparison. An evaluation
    that was not kept stays lost. Shares count from the resume on where the run is resumed with other thresholds. Where
    values follow from raw scores in another way than in the checkpoint (scale, shift or clip), shares and the best
    start afresh.

    Args:
        save_best: keep the best checkpoint.
    """

    def __init__(self, save_best: bool = True) -> None:
        super().__init__()
        self.save_best = save_best
        self.best: dict[str, Any] | None = None  # as _judged returns it
        self._held: list[dict[str, Any]] = []  # by evaluation: step, and by threshold whether it held
        self._duals: list[dict[str, float]] = []  # by collected batch
        self._improved = False
        self._transforms: dict[str, str] = {}  # how values follow from raw scores, in words; empty where they are these
        self._resumed_from: dict[str, float] | None = None  # thresholds of the checkpoint, until they are compared

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare the thresholds with those of a checkpoint, before the combiner moves its own."""
        self._count_afresh_under_other_thresholds(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare the thresholds with those of a checkpoint, before the combiner moves its own."""
        self._count_afresh_under_other_thresholds(pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Minibatch, batch_idx: int
    ) -> None:
        """Keep the multipliers of a collected batch."""
        if batch.collected is not None and (duals := combiner_report(pl_module).get("duals")):
            self._duals.append(duals)

    def on_evaluation(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        statistics: dict[str, Statistics],
        batches: list[Evaluation],
    ) -> None:
        """Judge it against the thresholds, and log."""
        self._improved = False
        thresholds, scored = thresholds_by_unit(pl_module)[0], {name for name, s in statistics.items() if s.count}
        if trainer.sanity_checking:
            return
        if not thresholds:  # resumed without those that the memory is of
            self.best, self._held = None, []
        if scored.isdisjoint(thresholds):
            return
        step, primary = step_of(trainer, pl_module), _primary(pl_module)
        self._use_unit({name: s.transform for name, s in statistics.items()}, {primary, *thresholds})
        self.best = _judged_again(self.best, thresholds, primary)
        held = {name: _upper(statistics[name]) >= b for name, b in thresholds.items() if name in scored}
        # The last step may be evaluated twice, inside the run and after it: that is one evaluation.
        self._held = [entry for entry in self._held if entry["step"] != step] + [{"step": step, "held": held}]
        # After fitting no optimiser is there to save. An objective without a score may be anywhere below its threshold.
        if trainer.state.fn == TrainerFn.FITTING and scored >= {primary, *thresholds}:
            self._rank(step, statistics, thresholds, primary)
        report = self.report()
        metrics = {f"thresholds_held/{name}": share for name, share in report["thresholds_held"].items()}
        metrics |= {f"duals_range/{name}": high - low for name, (low, high) in report["duals_range"].items()}
        log_everywhere(trainer, pl_module, metrics)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the best, now that all callbacks have seen the evaluation."""
        checkpoint: Any = trainer.checkpoint_callback
        if self._improved and self.save_best and checkpoint is not None and checkpoint.dirpath:
            trainer.save_checkpoint(f"{checkpoint.dirpath}/{BEST}", weights_only=False)
        self._improved = False

    def report(self) -> dict[str, Any]:
        """What the summary has of it: empty without thresholds."""
        if not self._held:
            return {}
        half, quarter = self._held[len(self._held) // 2 :], self._duals[len(self._duals) * 3 // 4 :]
        names = list(self._held[-1]["held"])
        judged = {name: [entry["held"][name] for entry in half if name in entry["held"]] for name in names}
        moved = {name: [duals[name] for duals in quarter if name in duals] for name in names}
        return {
            "thresholds_held": {name: sum(told) / len(told) for name, told in judged.items()},
            "thresholds_held_of": len(half),
            "duals_range": {name: [min(found), max(found)] for name, found in moved.items() if found},
            "best": self.best,
        }

    def _count_afresh_under_other_thresholds(self, pl_module: LightningModule) -> None:
        """Shares are of one set of thresholds; those that adapt are in the checkpoint, and are no others for it."""
        if self._resumed_from is not None and self._resumed_from != thresholds_by_unit(pl_module)[0]:
            self._held = []
        self._resumed_from = None

    def _use_unit(self, transforms: dict[str, str], names: set[str]) -> None:
        """Forget what was measured in another unit; ``names`` are the objectives that count."""
        before = self._transforms
        if any(before.get(name, words) != words for name, words in transforms.items() if name in names):
            rank_zero_warn(
                "values follow from raw scores in another way than in the checkpoint: its best evaluation is no longer "
                "compared with, and shares of held thresholds count from here"
            )
            self.best, self._held = None, []
        self._transforms = transforms

    def _rank(self, step: int, statistics: dict[str, Statistics], thresholds: dict[str, float], primary: str) -> None:
        scored = {name: s for name, s in statistics.items() if s.count}
        now = _judged(
            {
                "step": step,
                "means": {name: s.mean for name, s in scored.items()},
                "std_errors": {name: _or_none(s.std_error) for name, s in scored.items()},
                "stds": {name: _or_none(s.std) for name, s in scored.items()},
            },
            thresholds,
            primary,
        )
        if self.best is None or _rank_of(now) > _rank_of(self.best):
            self.best, self._improved = now, True

    def state_dict(self) -> dict[str, Any]:
        """All of it."""
        return {"best": self.best, "held": self._held, "duals": self._duals, "transforms": self._transforms}

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the thresholds in force."""
        checkpoint["callbacks"][self.state_key]["thresholds"] = thresholds_by_unit(pl_module)[0]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from there."""
        self.best, self._held, self._duals = state_dict["best"], state_dict["held"], state_dict["duals"]
        if self.best is not None and "thresholds" not in self.best:  # an old checkpoint: nobody knows what judged it
            self.best = None
        self._transforms, self._resumed_from = state_dict.get("transforms", {}), state_dict.get("thresholds")


def _judged(entry: dict[str, Any], thresholds: dict[str, float], primary: str) -> dict[str, Any]:
    """An evaluation with its verdict: whether it is feasible, its violation, its primary mean, and the thresholds."""
    violation = 0.0
    for name, threshold in thresholds.items():
        std = entry["stds"][name]
        spread = 1.0 if std is None else max(std, 1e-12)
        violation = max(violation, (threshold - entry["means"][name]) / spread)
    return entry | {
        "thresholds": dict(thresholds),
        "feasible": violation == 0,
        "violation": violation,
        "primary_objective": primary,
        "primary": entry["means"][primary],
    }


def _judged_again(entry: dict[str, Any] | None, thresholds: dict[str, float], primary: str) -> dict[str, Any] | None:
    """The same under other thresholds, or another primary objective; None where it has no mean for one of them."""
    if entry is None or not {primary, *thresholds} <= entry["means"].keys():
        return None
    return _judged(entry, thresholds, primary)


def _or_none(number: float) -> float | None:
    return number if math.isfinite(number) else None  # JSON has no NaN


def _rank_of(entry: dict[str, Any]) -> tuple[bool, float]:
    return entry["feasible"], entry["primary"] if entry["feasible"] else -entry["violation"]


def _upper(statistics: Statistics) -> float:
    """End of the 95 % interval of the mean; the mean where there is no interval."""
    return statistics.mean + (Z * statistics.std_error if math.isfinite(statistics.std_error) else 0.0)


def thresholds_by_unit(pl_module: LightningModule) -> tuple[dict[str, float], dict[str, float]]:
    """Thresholds by name: those in the unit of evaluations, and those that no evaluation can be held against."""
    module: Any = pl_module
    thresholds = combiner_report(pl_module).get("thresholds", {})
    if not thresholds or Signal.WINS not in module.combiner.needs:
        return thresholds, {}
    inside = {name: threshold for name, threshold in thresholds.items() if name in module.evaluated_in_wins}
    return inside, {name: threshold for name, threshold in thresholds.items() if name not in inside}


def _primary(pl_module: LightningModule) -> str:
    module: Any = pl_module
    name: str = module.combiner.primary or module.objective_names[0]
    return name
