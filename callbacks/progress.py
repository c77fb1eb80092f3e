"""A progress bar that shows the objectives."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar


class ObjectiveProgressBar(TQDMProgressBar):
    """Lightning's progress bar with the means of the objectives and the hypervolume beside the loss.

    Without a terminal (a log file, CI) it is refreshed less often.

    Args:
        refresh_rate: updates between two refreshes; ``None`` is 1 in a terminal and 10 elsewhere.
    """

    def __init__(self, refresh_rate: int | None = None) -> None:
        import sys

        super().__init__(refresh_rate=refresh_rate or (1 if sys.stderr.isatty() else 10), leave=False)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Means of the objectives of the last collected batch, as values and raw if they differ; the hypervolume."""
        items = super().get_metrics(trainer, pl_module)
        items.pop("v_num", None)
        for name in pl_module.objective_names:  # type: ignore[union-attr]  # of AlignmentModule
            raw = trainer.callback_metrics.get(f"rewards/{name}/mean")
            value = trainer.callback_metrics.get(f"values/{name}/mean")
            if raw is not None:
                items[str(name)] = f"{raw:.3f}" if value is None else f"{value:.3f} (raw {raw:.3f})"
        if "pareto/hypervolume" in trainer.callback_metrics:
            items["hypervolume"] = f"{float(trainer.callback_metrics['pareto/hypervolume']):.3f}"
        return items
