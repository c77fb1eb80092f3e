"""Names of metrics that checkpoints and early stopping follow: a misspelt one is refused before a run starts."""

import difflib
from itertools import product
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import LearningRateMonitor

from moa_lightning.callbacks.rewards import combiner_report
from moa_lightning.errors import UserError
from moa_lightning.module import AlignmentModule
from moa_lightning.training.run_checkpoint import RunCheckpoint

_OF_OBJECTIVES = {  # what is logged of each, by the part before its name
    "rewards": ("/mean", "/std", "/standardized", "/missing"),
    "values": ("/mean", "/std", ""),
    "advantages": ("/mean", "/std"),
    "weights": ("",),
    "scheduled_weights": ("",),
    "value_loss": ("",),
    "thresholds_held": ("",),
    "duals_range": ("",),
}
_OTHERS = {
    *("loss", "policy_loss", "kl_loss", "entropy", "clip_ratio", "approx_kl", "ess", "capped_ratio"),
    *("pair_accuracy", "pair_margin", "pairs", "score/mean", "kl", "kl_coefficient", "prior_ess", "prior_truncated"),
    *("completions/truncated", "completions/mean_length", "step", "epoch"),
    *("throughput/tokens_per_second", "throughput/generated_tokens_per_second"),
    *(f"throughput/share_{name}" for name in ("generation", "scoring", "forward", "learning")),
}


def check_monitors(trainer: Trainer, module: AlignmentModule) -> None:
    """Refuse a callback's ``monitor`` that no evaluation or update of this run logs.

    Lightning finds out at the first checkpoint. Pieces and callbacks of the user's may log anything: with them only
    the names of our evaluations are checked.

    Raises:
        UserError: one line with the nearest name, or with those of evaluations.
    """
    evaluations, known = _of_evaluations(module), None if _may_log_others(trainer, module) else _of_updates(module)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # set, not declared
        monitor = getattr(callback, "monitor", None)
        if not isinstance(monitor, str) or monitor in evaluations:
            continue
        if (monitor in known) if known is not None else not monitor.startswith(("val/rewards/", "val/values/")):
            continue
        where = "checkpoint" if isinstance(callback, RunCheckpoint) else type(callback).__name__
        near = difflib.get_close_matches(monitor, [*evaluations, *(known or ())], n=1, cutoff=0.8)
        hint = f"did you mean '{near[0]}'?" if near else f"evaluations log {', '.join(evaluations)}"
        raise UserError(f"{where}.monitor: this run logs no metric '{monitor}'; {hint}")


def _of_evaluations(module: AlignmentModule) -> list[str]:
    objectives = module.panel.objectives
    transformed = [name for name, objective in objectives.items() if objective.transform]
    means = [f"val/rewards/{name}/mean" for name in objectives] + [f"val/values/{name}/mean" for name in transformed]
    return [*means, "pareto/hypervolume", "pareto/size"]


def _of_updates(module: AlignmentModule) -> set[str]:
    """All that an update may log; some of it depends on the settings."""
    names = module.panel.names
    families = _OF_OBJECTIVES | {family: (*_OF_OBJECTIVES.get(family, ()), "") for family in combiner_report(module)}
    found = {f"{family}/{name}{end}" for family, ends in families.items() for name in names for end in ends}
    return found | _OTHERS | {f"correlation/{a}/{b}" for a, b in product(names, names) if a != b}


def _may_log_others(trainer: Trainer, module: AlignmentModule) -> bool:
    pieces = (module.combiner, module.source, module.loss, module.kl, module.reference)
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]  # set, not declared
    if any(isinstance(callback, LearningRateMonitor) for callback in callbacks):
        return True
    packages = {type(piece).__module__.partition(".")[0] for piece in (*pieces, *callbacks)}
    return not packages <= {"moa_lightning", "lightning"}
