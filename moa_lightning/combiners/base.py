"""The contract of a combiner: N signals in, one score out.

Legend: B sequences, T tokens, N objectives.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from moa_lightning.combiners.claims import Claim
from moa_lightning.schedules import Weight, WeightSchedule
from moa_lightning.signals import GradientPlace, Signal, Signals
from moa_lightning.types import Experience, State


@dataclass(frozen=True)
class Combined:
    """The outcome of one combination."""

    score: Tensor  # (B, T) or (B,), detached: the advantage that the policy loss trains on
    weights_N: Tensor  # the share each objective got, averaged over what counted; for the logs
    # For losses on pairs of responses only, whose logit is (beta (D_i - D_j) - (margin_i - margin_j)) / weight:
    margin_B: Tensor | None = None
    weight: float = 1.0
    state: State | None = None  # to go on with, where an update itself teaches something; None is the one before


class Combiner(ABC):
    """How N objectives become one. Subclasses are frozen dataclasses, validated in ``__post_init__``.

    A combiner holds configuration only. What it remembers lives in the state, which is passed in and returned:
    float32 tensors, identical on every rank, saved in the checkpoint.
    """

    needs: ClassVar[frozenset[Signal]]
    requires_kl: ClassVar[bool] = False  # whether it works only with a KL penalty in the reward, above 0
    claims: ClassVar[frozenset[Claim]] = frozenset()  # that hold whatever the settings are

    @property
    def claimed(self) -> frozenset[Claim]:
        """Claims that hold under these settings."""
        return self.claims

    @property
    def gives_weights(self) -> bool:
        """Whether scores are never below 0, so that a loss may take them as importance weights."""
        return False

    @property
    def charged_kl(self) -> bool:
        """Whether a KL penalty in the reward reaches the score, through advantages that it is in or of itself."""
        return Signal.ADVANTAGES in self.needs

    @property
    def gradients_at(self) -> GradientPlace:
        """Where ``signals.gramian`` takes the gradients; of no effect on a combiner that does not need it."""
        return GradientPlace.REPRESENTATION

    def init(self, objectives: Sequence[str], weights_N: Tensor) -> State:
        """First state, for the trained objectives in order and the weights that the user gave them.

        Raises:
            UserError: the configuration does not fit the objectives.
        """
        return {}

    def resume(self, saved: State, fresh: State) -> State:
        """State to go on with, from a checkpoint's and from :meth:`init` under the present configuration.

        What the configuration says is taken from ``fresh``: here nothing.
        """
        return saved

    def schedules(self, defaults: Mapping[str, Weight]) -> dict[str, WeightSchedule]:
        """Weights that :meth:`proceed` takes from schedules, by objective; none for a combiner that takes no weights.

        Args:
            defaults: weights of the trained objectives, which count where it has none of its own.

        Raises:
            UserError: a weight has a schedule that the combiner cannot follow.
        """
        return {}

    def proceed(self, objectives: Sequence[str], weights_N: Tensor, progress: float, state: State) -> State:
        """State at this progress, a share of the run: called before each :meth:`observe` where there are schedules.

        Raises:
            UserError: the weights at this progress do not fit.
        """
        return state

    def observe(self, experience: Experience, state: State) -> State:
        """State after a newly collected batch (duals, averages, ideal points). Called once per batch."""
        return state

    def evaluated(self, values_N: Tensor, state: State) -> State:
        """State after an evaluation: mean values of the trained objectives, after their transform; NaN is unknown."""
        return state

    def report(self, state: State) -> dict[str, Tensor]:
        """What of the state is worth a curve: by name one number per objective, ``(N,)``, NaN where there is none."""
        return {}

    @abstractmethod
    def combine(self, signals: Signals, state: State) -> Combined:
        """One score from N signals. Pure; called once per optimiser step."""
