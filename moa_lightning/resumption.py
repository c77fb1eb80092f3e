"""What a run owes when it goes on from a checkpoint."""

from lightning.pytorch import LightningModule


class ResumedModule(LightningModule):
    """A module whose run makes up for an evaluation that its checkpoint was written before.

    Lightning writes a checkpoint of every so many steps between the step and the evaluation that is due after it, and
    leaves that evaluation out when it goes on from there. Combiners that hear of evaluations would differ from then on.
    """

    evaluated_at: int | None = None  # the step of the last whole evaluation

    def on_train_start(self) -> None:
        """Evaluate, if that is due after the step of the checkpoint and was not done."""
        fit_loop = self.trainer.fit_loop
        epoch_loop, fetcher = fit_loop.epoch_loop, fit_loop._data_fetcher
        by_the_clock = getattr(self.trainer, "_val_check_time_interval", None) is not None
        if self.trainer.global_step in (0, self.evaluated_at) or fetcher is None or by_the_clock:
            return
        if epoch_loop.val_loop.restarted_mid_evaluation:  # Lightning makes that one anew
            return
        if epoch_loop._should_check_val_fx(fetcher):
            self.trainer.validating = True
            epoch_loop.val_loop.restarting = False
            epoch_loop.val_loop.run()
            self.trainer.training = True
