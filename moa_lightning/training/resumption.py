"""What a run owes when it goes on from a checkpoint."""

from dataclasses import dataclass
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor
from torch.optim import Optimizer

from moa_lightning.errors import UserError
from moa_lightning.utils.lightning_private import validation_is_due


@dataclass(frozen=True)
class OptimizerSettings:
    """An optimiser's class and the hyper-parameters of its groups, as they were configured.

    PyTorch restores an optimiser with the hyper-parameters of the checkpoint, so that a learning rate that was changed
    for a resumed run had no effect. With these a change is taken.

    Args:
        name: of the class; ``None`` where a checkpoint does not say.
        groups: by parameter group, without the parameters.
    """

    name: str | None
    groups: tuple[dict[str, Any], ...]

    @classmethod
    def of(cls, optimizer: Optimizer) -> "OptimizerSettings":
        """Those of an optimiser that was just made: no scheduler has changed its learning rate."""
        return cls(type(optimizer).__name__, tuple(_plain(group) for group in optimizer.param_groups))

    @classmethod
    def of_checkpoint(cls, checkpoint: dict[str, Any]) -> "OptimizerSettings | None":
        """Those that a checkpoint was written under, if it says."""
        if saved := checkpoint["moa"].get("optimizer"):
            return cls(saved["name"], tuple(saved["groups"]))
        states = checkpoint.get("optimizer_states") or []
        groups = [_plain(group) for group in states[0].get("param_groups", [])] if states else []
        return cls(
            None, tuple({**group, "lr": group.get("initial_lr", group["lr"])} for group in groups if "lr" in group)
        )

    def plain(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"name": self.name, "groups": list(self.groups)}

    def apply(self, optimizer: Optimizer, before: "OptimizerSettings", schedulers: list[Any]) -> None:
        """Change in a restored optimiser what differs from the settings of the checkpoint. In place.

        Under a scheduler the learning rate of the moment is multiplied by what the configured one has changed by.

        Raises:
            UserError: the checkpoint is of another optimiser, whose memory means something else.
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
    """A module whose run makes up for an evaluation that its checkpoint was written before.

    Lightning writes a checkpoint of every so many steps between the step and the evaluation that is due after it, and
    leaves that evaluation out when it goes on from there. Combiners that hear of evaluations would differ from then on.
    """

    evaluated_at: int | None = None  # the step of the last whole evaluation
    optimizer_given: OptimizerSettings | None = None  # of this run
    optimizer_before: OptimizerSettings | None = None  # of the checkpoint, until the restored optimiser has this run's
    loaded_step = 0  # updates behind the weights of the checkpoint that was loaded

    @property
    def steps_done(self) -> int:
        """Updates behind the weights: the Trainer's count, or that of the checkpoint where nothing is trained."""
        return self.trainer.global_step or self.loaded_step

    def on_train_start(self) -> None:
        """Take this run's hyper-parameters; evaluate, if that is due after the checkpoint's step and was not done."""
        if self.optimizer_given is not None and self.optimizer_before is not None:
            schedulers = [config.scheduler for config in self.trainer.lr_scheduler_configs]
            self.optimizer_given.apply(self.trainer.optimizers[0], self.optimizer_before, schedulers)
            self.optimizer_before = None
        loop = self.trainer.fit_loop.epoch_loop.val_loop
        if self.trainer.global_step in (0, self.evaluated_at):
            return
        if loop.restarted_mid_evaluation:  # Lightning makes that one anew
            return
        if validation_is_due(self.trainer):
            self.trainer.validating = True
            loop.restarting = False
            loop.run()
            self.trainer.training = True


def _plain(group: dict[str, Any]) -> dict[str, Any]:
    values = {name: float(value) if isinstance(value, Tensor) else value for name, value in group.items()}
    return {name: value for name, value in values.items() if name != "params"}
