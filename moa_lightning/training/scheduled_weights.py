"""Weights of the objectives that follow a schedule.

Legend: N trained objectives.
"""

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn

from moa_lightning.combiners import Combiner
from moa_lightning.errors import UserError
from moa_lightning.rewards import RewardPanel
from moa_lightning.schedules import scheduled
from moa_lightning.types import State


class ScheduledWeights:
    """Updates the weights in the combiner's state by their schedules. Without schedules it does nothing.

    Args:
        combiner: the combiner whose state has the weights.
        panel: the objectives with their weights.

    Raises:
        UserError: the combiner cannot follow a schedule.
    """

    def __init__(self, combiner: Combiner, panel: RewardPanel) -> None:
        self.combiner, self.panel = combiner, panel
        self.progress = 0.0  # of the run, in [0, 1], when the last batch was collected
        self.followed = combiner.schedules(panel.weights)
        for name, schedule in scheduled(panel.weights).items():
            if self.followed.get(name) is not schedule:
                rank_zero_warn(
                    f"the schedule of the weight of objective '{name}' has no effect: {type(combiner).__name__} takes "
                    "no weights, or has its own"
                )

    def start(self) -> State:
        """The combiner's initial state, after checking the weights at every knot of the schedules.

        Raises:
            UserError: the weights or the combiner's configuration do not fit the objectives.
        """
        state = self.combiner.init(self.panel.trained_names, self.panel.weights_at(0.0))
        for knot in sorted({knot for schedule in self.followed.values() for knot in schedule.knots}):
            self.at(knot, state)
        return state

    def check(self, trainer: Trainer) -> None:
        """Refuse an unlimited run, which has no progress.

        Raises:
            UserError: neither steps nor epochs are limited.
        """
        if self.followed and trainer.max_steps == -1 and trainer.max_epochs == -1:
            raise UserError(
                f"the weight of '{next(iter(self.followed))}' follows the progress of the run, and this run has no "
                "end; set trainer.max_steps"
            )

    def advance(self, trainer: Trainer, state: State) -> State:
        """Update the state for the batch that is being collected."""
        if not self.followed:
            return state
        self.progress = min(trainer.global_step / trainer.estimated_stepping_batches, 1.0)
        return self.at(self.progress, state)

    def resume(self, progress: float, state: State) -> State:
        """Update an initial state to a checkpoint's progress, so that the batch in flight keeps its weights."""
        self.progress = progress
        return self.at(progress, state)

    def at(self, progress: float, state: State) -> State:
        """Update the state to this progress."""
        if not self.followed:
            return state
        names, weights_N = self.panel.trained_names, self.panel.weights_at(progress)
        return self.combiner.proceed(names, weights_N, progress, state)

    def report(self, state: State) -> dict[str, float]:
        """The current weights by metric name; empty without schedules."""
        if not self.followed:
            return {}
        values = zip(self.panel.trained_names, state["weights"].tolist(), strict=True)
        return {f"scheduled_weights/{name}": value for name, value in values}
