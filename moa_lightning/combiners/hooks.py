"""What a combiner may do besides: each hook has a default, so a combiner overrides what it needs and nothing else.

Legend: N objectives.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor

from moa_lightning.combiners.claims import Claim
from moa_lightning.schedules import Weight, WeightSchedule
from moa_lightning.signals import GradientPlace, Signal
from moa_lightning.types import State


class MakesClaims:
    """What is promised of its update."""

    claims: ClassVar[frozenset[Claim]] = frozenset()  # that hold whatever the settings are

    @property
    def claimed(self) -> frozenset[Claim]:
        """Claims that hold under these settings."""
        return self.claims

    @property
    def gives_weights(self) -> bool:
        """Whether scores are never below 0, so that a loss may take them as importance weights."""
        return False


class TakesKLPenalty:
    """Whether a KL penalty in the reward reaches the score."""

    needs: ClassVar[frozenset[Signal]]

    @property
    def takes_kl_penalty(self) -> bool:
        """Whether it does: in the advantages that the combiner reads, or off its score. See ``losses/kl.py``."""
        return Signal.ADVANTAGES in self.needs


class TakesGradients:
    """Where gradients are taken, for a combiner that needs ``GRAMIAN``."""

    @property
    def gradients_at(self) -> GradientPlace:
        """Where ``signals.gramian`` takes the gradients; of no effect on a combiner that does not need it."""
        return GradientPlace.REPRESENTATION


class FollowsSchedules:
    """Weights that change with the progress of the run."""

    def schedules(self, defaults: Mapping[str, Weight]) -> dict[str, WeightSchedule]:
        """Weights that :meth:`proceed` takes from schedules, by objective; none for a combiner that takes no weights.

        Args:
            defaults: weights of the trained objectives, which count where it has none of its own.

        Raises:
            UserError: a weight has a schedule that the combiner cannot follow.
        """
        return {}

    def proceed(self, objectives: Sequence[str], weights_N: Tensor, progress: float, state: State) -> State:
        """State at this progress, a share of the run: called before each ``observe`` where there are schedules.

        Raises:
            UserError: the weights at this progress do not fit.
        """
        return state


class ObservesEvaluations:
    """What an evaluation teaches."""

    def observe_evaluation(self, values_N: Tensor, state: State) -> State:
        """State after an evaluation: mean values of the trained objectives, after their transform; NaN is unknown."""
        return state


class ReportsCurves:
    """What is logged of the state."""

    def report(self, state: State) -> dict[str, Tensor]:
        """What of the state is worth a curve: by name one number per objective, ``(N,)``, NaN where there is none."""
        return {}


class Resumes:
    """How the state continues from a checkpoint."""

    def resume(self, saved: State, fresh: State) -> State:
        """State to resume with, from a checkpoint's and from ``init`` under the present configuration.

        What the configuration says is taken from ``fresh``: here nothing.
        """
        return saved
