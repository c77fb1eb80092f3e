"""What combiners with weights of the user's share: a number each, or a schedule.

Legend: N objectives.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor

from moa_lightning.combiners.base import Combiner
from moa_lightning.combiners.shared.named import named_weights
from moa_lightning.errors import UserError
from moa_lightning.schedules import Weight, WeightSchedule, scheduled
from moa_lightning.types import State


class Weighted(Combiner):
    """A combiner that trains with the weights that it is given; ``state["weights"]`` are those of the moment."""

    weights: dict[str, Weight] | None = None  # a subclass without a field of this name takes the objectives' own

    def schedules(self, defaults: Mapping[str, Weight]) -> dict[str, WeightSchedule]:
        """Those among its weights, or among the objectives' where it has none of its own."""
        return scheduled(defaults if self.weights is None else self.weights)

    def init(self, objectives: Sequence[str], weights_N: Tensor) -> State:
        """The weights by name, summing to 1, as they are when the run starts."""
        return self.proceed(objectives, weights_N, 0.0, {})

    def proceed(self, objectives: Sequence[str], weights_N: Tensor, progress: float, state: State) -> State:
        """The weights by name, summing to 1, as they are at this progress.

        Raises:
            UserError: the weights do not fit the objectives.
        """
        return state | {"weights": named_weights(self.weights, objectives, weights_N, progress)}

    def resume(self, saved: State, fresh: State) -> State:
        """The configuration's weights; of the rest what was learnt."""
        return saved | {"weights": fresh["weights"]}


class FirstWeights(Combiner):
    """A combiner that moves its weights by itself, from first ones that it is given."""

    weights: dict[str, Weight] | None

    def schedules(self, defaults: Mapping[str, Weight]) -> dict[str, WeightSchedule]:
        """None: a first weight is a number.

        Raises:
            UserError: a first weight has a schedule.
        """
        for name in scheduled(defaults if self.weights is None else self.weights):
            raise UserError(
                f"{type(self).__name__} moves the weights by itself, from the first ones, so the weight of '{name}' "
                "cannot follow a schedule; give it a number, or use Linear or GDPO, which follow schedules"
            )
        return {}
