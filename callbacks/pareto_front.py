"""The evolving Pareto front of a run.

Legend: P evaluation points, N trained objectives.
"""

import csv
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_warn

from moa_lightning.callbacks.evaluations import EvaluationCallback, log_everywhere, step_of
from moa_lightning.callbacks.front_plot import draw_front
from moa_lightning.callbacks.writing import Writing
from moa_lightning.errors import UserError
from moa_lightning.functional import hypervolume, non_dominated
from moa_lightning.types import Evaluation, Statistics
from moa_lightning.utils.atomic_file import atomic_file


class ParetoFront(EvaluationCallback):
    """Keeps the mean of every objective at every evaluation, the non-dominated ones among them, and their hypervolume.

    Writes ``front.csv`` and ``front.png`` into the run folder after each evaluation, logs ``pareto/hypervolume`` and
    ``pareto/size``, and, with a wandb logger, a table, a scatter and the picture. The points are means per checkpoint
    along one run. They are means of values, after an objective's scale, shift and clip: the unit of training and of
    thresholds, in which bigger is better. Where values differ from raw scores, the raw mean and its standard error
    stand beside them, as ``<name>_raw`` and ``<name>_raw_std_error``.

    Args:
        reference: the point, by objective, from which the hypervolume counts, in values. It should be worse than
            anything worth having, and the same for all runs that are compared. ``None`` fixes it at the first
            evaluation: each objective's mean minus one standard deviation.
    """

    def __init__(self, reference: dict[str, float] | None = None) -> None:
        super().__init__()
        self.reference = reference
        self._writing = Writing()
        self.points: list[dict[str, Any]] = []  # step, and mean and std_error by objective, of values and raw scores
        self._transforms: dict[str, str] = {}  # in which the points' values follow from raw scores
        self._given = reference is not None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a reference point of other objectives."""
        names = _names(pl_module)
        if self.reference is not None and set(self.reference) != set(names):
            raise UserError(
                f"pareto_front.reference must name each trained objective once: {', '.join(names)}; got "
                f"{', '.join(self.reference)}"
            )

    def on_evaluation(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        statistics: dict[str, Statistics],
        batches: list[Evaluation],
    ) -> None:
        """Add the point; write, draw and log."""
        names = _names(pl_module)
        silent = [name for name in names if not statistics[name].count]
        if silent:
            rank_zero_warn(f"no response was scored by {', '.join(silent)}: this evaluation is not on the Pareto front")
            return
        self._use_unit({name: statistics[name].transform for name in names if statistics[name].transform})
        if self.reference is None:
            self.reference = {name: statistics[name].mean - statistics[name].std for name in names}
        point = {
            "step": step_of(trainer, pl_module),
            "mean": {name: statistics[name].mean for name in names},
            "std_error": {name: statistics[name].std_error for name in names},
            "raw_mean": {name: statistics[name].raw_mean for name in self._transforms},
            "raw_std_error": {name: statistics[name].raw_std_error for name in self._transforms},
        }
        # The last step may be evaluated twice, inside the run and after it: that is one point.
        self.points = [p for p in self.points if p["step"] != point["step"]] + [point]
        metrics = {"pareto/hypervolume": self.hypervolume(), "pareto/size": float(sum(self.on_front()))}
        log_everywhere(trainer, pl_module, metrics)
        if trainer.is_global_zero:
            with self._writing.attempt(Path(trainer.default_root_dir, "front.csv")):
                self._write(Path(trainer.default_root_dir))
            for logger in trainer.loggers:
                if isinstance(logger, WandbLogger):
                    self._log_wandb(logger, Path(trainer.default_root_dir) / "front.png")

    def hypervolume(self, points: int | None = None) -> float:
        """Hypervolume of the first ``points`` evaluations, or of all."""
        if not self.points or self.reference is None:
            return 0.0
        names = list(self.points[0]["mean"])
        reference_N = torch.tensor([self.reference[name] for name in names], dtype=torch.float64)
        return hypervolume(self._matrix()[:points], reference_N)

    def on_front(self) -> list[bool]:
        """For each point, whether no other one dominates it."""
        mask: list[bool] = non_dominated(self._matrix()).tolist()
        return mask

    def _use_unit(self, transforms: dict[str, str]) -> None:
        """Drop the points of a resumed run that are in another unit: of raw scores, or of another scale or shift."""
        if self.points and transforms != self._transforms:
            changed = [name for name in self.points[0]["mean"] if transforms.get(name) != self._transforms.get(name)]
            then = ", ".join(f"{name} = {self._transforms.get(name, 'raw')}" for name in changed)
            now = ", ".join(f"{name} = {transforms.get(name, 'raw')}" for name in changed)
            rank_zero_warn(
                f"the checkpoint's Pareto front is in other units ({then}) than this run ({now}): it is started again"
            )
            self.points = []
            self.reference = self.reference if self._given else None
        self._transforms = transforms

    def _matrix(self) -> torch.Tensor:
        return torch.tensor([list(p["mean"].values()) for p in self.points], dtype=torch.float64)

    def _write(self, root: Path) -> None:
        root.mkdir(parents=True, exist_ok=True)
        names = list(self.points[0]["mean"])
        with atomic_file(root / "front.csv") as scratch, scratch.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            raw = [f"{name}_{what}" for what in ("raw", "raw_std_error") for name in self._transforms]
            writer.writerow(["step", "non_dominated", *names, *(f"{name}_std_error" for name in names), *raw])
            for point, best in zip(self.points, self.on_front(), strict=True):
                writer.writerow([point["step"], int(best), *_numbers(point)])
        assert self.reference is not None
        draw_front(
            self.points, self.on_front(), self.reference, self.hypervolume(), root / "front.png", self._transforms
        )

    def _log_wandb(self, logger: WandbLogger, picture: Path) -> None:
        import wandb

        names = list(self.points[0]["mean"])
        rows = [
            [p["step"], best, *p["mean"].values(), *p["raw_mean"].values()]
            for p, best in zip(self.points, self.on_front(), strict=True)
        ]
        columns = ["step", "non_dominated", *names, *(f"{name}_raw" for name in self._transforms)]
        table = wandb.Table(columns=columns, data=rows)
        logged: dict[str, Any] = {"pareto/front": table, "pareto/picture": wandb.Image(str(picture))}
        logged["trainer/global_step"] = self.points[-1]["step"]
        for a, b in combinations(names, 2):
            logged[f"pareto/{a}_{b}"] = wandb.plot.scatter(table, a, b, title=f"{b} over {a}")
        logger.experiment.log(logged)

    def state_dict(self) -> dict[str, Any]:
        """Points, their unit, and the reference."""
        return {"points": self.points, "reference": self.reference, "transforms": self._transforms}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume with the points; a reference point given now stays. Old checkpoints hold means of raw scores."""
        self.points = [{"raw_mean": {}, "raw_std_error": {}, **point} for point in state_dict["points"]]
        self._transforms = state_dict.get("transforms", {})
        if self.reference is None:
            self.reference = state_dict["reference"]


def _numbers(point: dict[str, Any]) -> list[float]:
    return [n for key in ("mean", "std_error", "raw_mean", "raw_std_error") for n in point[key].values()]


def _names(pl_module: LightningModule) -> list[str]:
    return list(pl_module.objective_names)  # type: ignore[arg-type]  # of AlignmentModule
