"""Resuming from a checkpoint: changed optimiser settings, and a validation that was still due."""

from dataclasses import dataclass
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor
from torch.optim import Optimizer

from moa_lightning.errors import UserError
from moa_lightning.utils.lightning_private import validation_is_due


@dataclass(frozen=True)
class OptimizerSettings:
    """An optimiser's class and the configured hyperparameters of its groups.

    PyTorch restores an optimiser with the hyperparameters of the checkpoint, so a learning rate that was changed for
    the resumed run would have no effect. These settings let the resumed run apply the change.

    Args:
        name: of the class; ``None`` if a checkpoint does not hold it.
        groups: hyperparameters of each parameter group.
    """

    name: str | None
    groups: tuple[dict[str, Any], ...]

    @classmethod
    def of(cls, optimizer: Optimizer) -> "OptimizerSettings":
        """Settings of a new optimiser, whose learning rate no scheduler has changed yet."""
        return cls(type(optimizer).__name__, tuple(_plain(group) for group in optimizer.param_groups))

    @classmethod
    def of_checkpoint(cls, checkpoint: dict[str, Any]) -> "OptimizerSettings | None":
        """Settings that a checkpoint was written with, if it holds them."""
        if saved := checkpoint["moa"].get("optimizer"):
            return cls(saved["name"], tuple(saved["groups"]))
        states = checkpoint.get("optimizer_states") or []
        groups = [_plain(group) for group in states[0].get("param_groups", [])] if states else []
        return cls(
            None, tuple({**group, "lr": group.get("initial_lr", group["lr"])} for group in groups if "lr" in group)
        )

    def plain(self) -> dict[str, Any]:
        """Convert to plain containers, for a checkpoint."""
        return {"name": self.name, "groups": list(self.groups)}

    def apply(self, optimizer: Optimizer, before: "OptimizerSettings", schedulers: list[Any]) -> None:
        """Apply the settings that differ from the checkpoint's to a restored optimiser. In place.

        With a scheduler, the current learning rate is scaled by the ratio of the new to the old configured one.

        Args:
            optimizer: restored from the checkpoint.
            before: settings of the checkpoint.
            schedulers: of this optimiser.

        Raises:
            UserError: the checkpoint is of another optimiser, whose state does not fit.
        """
        if before.name not in (None, self.name):
            raise UserError(
                f"the checkpoint was trained with optimizer {before.name}, this run uses {self.name}; use the run's "
                "own config.yaml, or start from its exported policy"
            )
        for i, (group, old, new) in enumerate(zip(optimizer.param_groups, before.groups, self.groups, strict=False)):
            for key in (key for key in new if key in old and old[key] != new[key]):
                if key != "lr":
                    group[key] = new[key]
                    continue
                group["lr"] = group["lr"] * new["lr"] / old["lr"] if old["lr"] else new["lr"]
                if "initial_lr" in group:
                    group["initial_lr"] = new["lr"]
                for scheduler in schedulers:
                    if hasattr(scheduler, "base_lrs"):
                        scheduler.base_lrs[i] = new["lr"]


class ResumedModule(LightningModule):
    """A module that runs the validation that Lightning skips when resuming from a checkpoint saved just before it.

    Lightning saves a checkpoint of ``every_n_train_steps`` between the step and the validation that is due after it.
    When it resumes from there, it skips that validation. Combiners that use evaluations would then differ from an
    uninterrupted run.
    """

    evaluated_at: int | None = None  # the step of the last complete evaluation
    optimizer_given: OptimizerSettings | None = None  # of this run
    optimizer_before: OptimizerSettings | None = None  # of the checkpoint, until this run's have been applied
    loaded_step = 0  # number of updates of the loaded checkpoint

    @property
    def steps_done(self) -> int:
        """Number of updates of the weights: the Trainer's count, or that of the checkpoint when nothing is trained."""
        return self.trainer.global_step or self.loaded_step

    def on_train_start(self) -> None:
        """Apply this run's optimiser settings, and run a validation that was due after the checkpoint's step."""
        if self.optimizer_given is not None and self.optimizer_before is not None:
            schedulers = [config.scheduler for config in self.trainer.lr_scheduler_configs]
            self.optimizer_given.apply(self.trainer.optimizers[0], self.optimizer_before, schedulers)
            self.optimizer_before = None
        loop = self.trainer.fit_loop.epoch_loop.val_loop
        if self.trainer.global_step in (0, self.evaluated_at):
            return
        if loop.restarted_mid_evaluation:  # Lightning reruns that one
            return
        if validation_is_due(self.trainer):
            self.trainer.validating = True
            loop.restarting = False
            loop.run()
            self.trainer.training = True


def _plain(group: dict[str, Any]) -> dict[str, Any]:
    values = {name: float(value) if isinstance(value, Tensor) else value for name, value in group.items()}
    return {name: value for name, value in values.items() if name != "params"}
