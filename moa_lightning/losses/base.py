"""The interface of policy losses: a combined score in, a scalar loss out."""

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
    """A loss and its terms as detached scalars. Their mean over the processes is the mean over all rows."""

    loss: Tensor
    terms: dict[str, Tensor]


class PolicyLoss(ABC):
    """Turns a score into a loss. Subclasses are frozen dataclasses."""

    provides: ClassVar[frozenset[Signal]] = frozenset()
    """The signals that combiners can read from this loss, besides those of the source."""
    needs: ClassVar[frozenset[Signal]] = frozenset()
    """The signals that the source must provide for this loss."""
    takes_advantages: ClassVar[bool] = True
    """Whether scores may be negative."""

    @property
    @abstractmethod
    def clip_range(self) -> ClipRange:
        """How far the ratio may move before its gradient is 0; ``ClipRange()`` without clipping."""

    @abstractmethod
    def __call__(self, combined: Combined, experience: Experience, output: PolicyOutput, kl: KLPenalty) -> LossTerms:
        """Compute the loss of these rows, divided by the average number of tokens of as many rows over all processes.

        The mean over processes and accumulated minibatches is then the loss of all rows.
        """


def with_values_in_graph(loss: Tensor, output: PolicyOutput) -> Tensor:
    """Add a zero gradient for value heads that the loss does not train: DDP would wait for their gradients."""
    return loss if output.values_BTN is None else loss + 0.0 * output.values_BTN.sum()
