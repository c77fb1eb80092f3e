"""The combiners that the benchmarks run: all that the package exports, and variants worth a line of their own."""

import inspect
from dataclasses import dataclass

from torchjd.aggregation import CAGradWeighting

from moa_lightning import combiners as package
from moa_lightning.combiners import Combiner
from moa_lightning.combiners.shared.scores import ScoreCombiner
from moa_lightning.losses import PolicyLoss
from moa_lightning.signals import GradientPlace, Signal
from moa_lightning.training.compatibility import fitting_loss


@dataclass(frozen=True)
class Entry:
    """A combiner by the name that the tables give it."""

    name: str
    combiner: Combiner
    gradients_off: bool = False  # set so that it asks for none, though it could
    period: int = 1  # of so many steps the first one is dear

    @property
    def of_gradients(self) -> bool:
        """Whether it reads the Gram matrix of the objectives' gradients."""
        return Signal.GRAMIAN in self.combiner.needs and not self.gradients_off

    @property
    def kind(self) -> str:
        """What its cost is due to, which is what the limits are about."""
        if self.of_gradients and self.period == 1:
            return f"gradients, {self.combiner.gradients_at.value.replace('_', ' ')}"
        return "scores" if isinstance(self.combiner, ScoreCombiner) else "weights"

    @property
    def loss(self) -> PolicyLoss:
        """The loss that goes with it."""
        return fitting_loss(self.combiner)

    def limit(self, objectives: int) -> float | None:
        """The largest share of a step with ``Linear`` that it may add, of time and of memory; ``None``: no claim."""
        if self.name == "Linear":
            return None
        if not self.of_gradients or self.period > 1:
            return {"scores": 0.02, "weights": 0.03}[self.kind]
        at_representation = self.combiner.gradients_at is GradientPlace.REPRESENTATION
        return 0.30 if at_representation and objectives == 2 else None


def exported() -> list[Entry]:
    """Each exported combiner as it is without arguments, ``Linear`` first."""
    found = [
        Entry(name, combiner, period=combiner.interval if isinstance(combiner, package.DynamicWeights) else 1)
        for name, of_class in inspect.getmembers(package, inspect.isclass)
        if issubclass(of_class, Combiner) and not inspect.isabstract(of_class)
        for combiner in [of_class()]
    ]
    return sorted(found, key=lambda entry: entry.name != "Linear")


def variants() -> list[Entry]:
    """Other settings of them."""
    return [
        Entry("PAMA, signed", package.PAMA(noon=False)),
        Entry("PAMA, batch", package.PAMA(granularity="batch")),
        Entry("Lagrangian, optimistic", package.Lagrangian(dual=package.Optimistic())),
        Entry("CAID, iterated", package.CAID(interval=1)),
        Entry("DynamicWeights, front", package.DynamicWeights(lr=0.0, growth_scale=1.0), gradients_off=True),
        Entry("DynamicWeights, each step", package.DynamicWeights(interval=1)),
        Entry("Gramian, CAGrad", package.Gramian(weighting=CAGradWeighting(c=0.5))),
    ]


def deeper() -> list[Entry]:
    """Gradients below the representation."""
    return [
        Entry("Gramian, last layer", package.Gramian(at="last_layer")),
        Entry("Gramian, parameters", package.Gramian(at="parameters")),
    ]
