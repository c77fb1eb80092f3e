"""The contract of a policy loss: one score in, one loss out."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from moa_lightning.combiners.base import Combined
from moa_lightning.losses.kl import KLPenalty
from moa_lightning.models.policy import PolicyOutput
from moa_lightning.signals import ClipRange, Signal
from moa_lightning.types import Experience


@dataclass(frozen=True)
class LossTerms:
    """A loss and the scalars it is made of, detached. Their mean over the processes is that of all rows."""

    loss: Tensor
    terms: dict[str, Tensor]


class PolicyLoss(ABC):
    """Turns a score into a loss. Subclasses are frozen dataclasses."""

    provides: ClassVar[frozenset[Signal]] = frozenset()
    """What combiners can have from this loss beside what the source provides."""
    needs: ClassVar[frozenset[Signal]] = frozenset()
    """What the source must provide for it."""
    takes_advantages: ClassVar[bool] = True
    """Whether a score may be of either sign."""

    @property
    @abstractmethod
    def clip_range(self) -> ClipRange:
        """How far the ratio may move before the gradient stops; ``ClipRange()`` without clipping."""

    @abstractmethod
    def __call__(self, combined: Combined, experience: Experience, output: PolicyOutput, kl: KLPenalty) -> LossTerms:
        """Loss of these rows, divided by the number of tokens that this many rows have on average over all processes.

        So its mean over processes and accumulated minibatches is the loss of all rows.
        """


def with_values_in_graph(loss: Tensor, output: PolicyOutput) -> Tensor:
    """The same loss, with a gradient of 0 for value heads that it does not train: DDP would wait for theirs."""
    return loss if output.values_BTN is None else loss + 0.0 * output.values_BTN.sum()
