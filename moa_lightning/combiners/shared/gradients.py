"""What the combiners of gradients share: weights from the Gram matrix, on the advantages.

Legend: B sequences, T tokens, N objectives.
"""

from abc import abstractmethod
from typing import ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import override

from moa_lightning.combiners.base import Combined, Combiner
from moa_lightning.combiners.claims import Claim
from moa_lightning.distributed import all_rows
from moa_lightning.errors import UserError
from moa_lightning.functional.gramian import weights_from_gramian
from moa_lightning.signals import GradientPlace, Signal, Signals
from moa_lightning.types import State

Place = Literal["representation", "last_layer", "parameters"]


class GradientCombiner(Combiner):
    """Weights from the inner products of the objectives' gradients; then one ordinary backward pass.

    An objective without gradient on a minibatch, because it is constant there or could score nothing, gets weight 0
    and does not stop the others. The weights' magnitudes are divided by their sum: the method chooses the direction,
    and learning rate and KL strength mean what they mean with ``Linear``.
    """

    needs: ClassVar[frozenset[Signal]] = frozenset({Signal.ADVANTAGES, Signal.RATIO, Signal.GRAMIAN})

    at: Place

    @property
    def claimed(self) -> frozenset[Claim]:
        """Of gradients that are divided by their norms, lengths do not matter."""
        return self.claims | ({Claim.OWN_SCALE} if self.norm_power == 1 else set())

    @property
    @override
    def gradients_at(self) -> GradientPlace:
        return GradientPlace(self.at)

    @property
    def norm_power(self) -> float:
        """Each gradient is divided by its norm to this power first."""
        return 0.0

    @abstractmethod
    def weigh(self, gram_NN: Tensor, present_N: Tensor, state: State) -> Tensor:
        """Weights from a Gram matrix, float64 on the CPU, largest diagonal element 1.

        Args:
            gram_NN: of the objectives that have a gradient.
            present_N: bool, which of all objectives these are.
            state: what was remembered.
        """

    def combine(self, signals: Signals, state: State) -> Combined:
        """``sum_i w_i A_i`` per token; 0 where the method finds no direction."""
        assert signals.advantages_BTN is not None
        gram_NN = surrogate_gramian(signals)
        present_N = gram_NN.diagonal() > 0
        finite = bool(gram_NN.isfinite().all())  # else the loss is not finite either, which the module reports
        weights_N = weights_from_gramian(
            gram_NN if finite else torch.zeros_like(gram_NN),
            lambda scaled_NN: self.weigh(scaled_NN, present_N, state),
            self.norm_power,
        ).to(signals.advantages_BTN)
        score_BT = (signals.advantages_BTN.where(signals.present_BTN(), 0.0) * weights_N).sum(-1)
        shares_N = weights_N if weights_N.any() else torch.full_like(weights_N, 1 / len(weights_N))
        return Combined(score_BT, shares_N)


class MinNorm(GradientCombiner):
    """The min-norm point of the gradients, by TorchJD's Frank-Wolfe solver."""

    max_iters: int
    epsilon: float

    @property
    @abstractmethod
    def norm_power(self) -> float:
        """Each gradient is divided by its norm to this power first."""

    def __post_init__(self) -> None:
        if self.max_iters < 1 or not self.epsilon > 0:
            raise UserError(f"{type(self).__name__} needs max_iters >= 1 and epsilon > 0")

    @override
    def weigh(self, gram_NN: Tensor, present_N: Tensor, state: State) -> Tensor:
        from torchjd.aggregation import MGDAWeighting

        weights_N: Tensor = MGDAWeighting(epsilon=self.epsilon, max_iters=self.max_iters)(gram_NN)
        return weights_N


def surrogate_gramian(signals: Signals) -> Tensor:
    """Gram matrix (N, N) of the gradients of the objectives' surrogates, over all processes; float64, on the CPU."""
    assert signals.advantages_BTN is not None and signals.gramian is not None
    slopes_BTN = signals.slopes(signals.advantages_BTN)
    # In units of each objective's steepest slope nothing overflows or underflows, whatever the rewards' scales are.
    steepest_N = all_rows(slopes_BTN.abs().flatten(0, 1).amax(0, keepdim=True)).amax(0)
    gram_NN = signals.gramian(slopes_BTN / steepest_N.where(steepest_N > 0, 1.0)).double()
    return (gram_NN * steepest_N.double().outer(steepest_N.double())).cpu()
