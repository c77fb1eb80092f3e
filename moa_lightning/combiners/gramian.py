"""Gramian: any weighting of TorchJD that reads the Gram matrix of the objectives' gradients.

Legend: N objectives.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, get_type_hints

import torch
from torch import Tensor
from typing_extensions import override

from moa_lightning.combiners.claims import CONVEX, Claim
from moa_lightning.combiners.shared.gradients import GradientCombiner, Place
from moa_lightning.errors import UserError
from moa_lightning.types import Experience, State
from moa_lightning.utils.random_state import run_seed

if TYPE_CHECKING:  # TorchJD brings solvers that only this combiner and its like need
    from torchjd.aggregation import Weighting

_NO_CONFLICT = CONVEX | {Claim.ONE_OBJECTIVE, Claim.NON_CONFLICT}


def _claims_of(weighting: "Weighting[Any] | None") -> frozenset[Claim]:
    """By the weightings' theorems; nothing is claimed of others."""
    if weighting is None:
        return _NO_CONFLICT
    from torchjd.aggregation import DualProjWeighting, MGDAWeighting, UPGradWeighting

    claims = {
        UPGradWeighting: _NO_CONFLICT,
        DualProjWeighting: _NO_CONFLICT,
        MGDAWeighting: _NO_CONFLICT | {Claim.MIN_NORM},
    }
    return claims.get(type(weighting), frozenset())


@dataclass(frozen=True)
class Gramian(GradientCombiner):
    """Train on the weighted sum of the advantages, with weights by a method of multi-task learning.

    The method is a weighting of TorchJD, by its name or class path: ``UPGradWeighting``, ``MGDAWeighting``,
    ``CAGradWeighting``, ``PCGradWeighting``, ``FairGradWeighting`` (Nash-MTL is its alpha 1), ``DualProjWeighting``,
    ``IMTLGWeighting``, ``AlignedMTLWeighting``; a subclass of ``torchjd.aggregation.Weighting`` of your own as well.

    Choose it when: gradients conflict, and you want the method of multi-task learning that you know.
    Cost: as ``at`` says: one backward pass through the head, or N; and a small solve.
    Convergence: of UPGrad proved, to the front of smooth convex objectives; of others, see their papers.
    Source: Quinton & Rey, "Jacobian Descent for Multi-Objective Optimization", arXiv 2406.16232 (UPGrad, and TorchJD),
    which names the sources of the others; with ``norm_power`` and MGDA it is GAPO, arXiv 2507.01915. Deviations:
    the weights are divided by the sum of their magnitudes, because the gradients' scale is the learning rate's; an
    objective without gradient is left out of the problem; random orders (PCGrad) are drawn anew for each collected
    batch, alike on every process.

    Formula: ``A = sum_i c_i A_i / sum_i |c_i|`` with ``c = weighting(G)``, ``G_ij = g_i . g_j / (|g_i| |g_j|)^p``.
    Symbols: ``c`` is ``weights/<name>`` in the logs; ``p`` is ``norm_power``; ``g_i`` is the gradient of objective i's
    surrogate where ``at`` says; ``G`` is ``signals.gramian``.
    Missing score: adds 0 there, to the gradient as well; without any score in a minibatch its weight is 0.
    Watch: ``weights/<name>``: a weighting such as PCGrad may give weights that swing from batch to batch; more prompts
    in a batch calm them.

    Args:
        weighting: from the Gram matrix, its largest diagonal element 1, to the weights; ``None`` is
            ``UPGradWeighting``.
        at: where gradients are taken: at the last hidden state (``representation``, MGDA-UB's choice, one
            backward pass through the head for all objectives), at the trained parameters of the last block
            (``last_layer``, N short passes), or at all trained ``parameters`` (N whole passes and N gradients in
            memory).
        norm_power: divide each gradient by its norm to this power first; 0 leaves it as it is.
    """

    weighting: "Weighting | None" = None  # type: ignore[type-arg]  # of a Gram matrix
    at: Place = "representation"
    norm_power: float = 0.0

    claims: ClassVar[frozenset[Claim]] = frozenset({Claim.COMMON_SCALE})

    @property
    def claimed(self) -> frozenset[Claim]:
        """What is known of the weighting as well."""
        return super().claimed | _claims_of(self.weighting)

    def __post_init__(self) -> None:
        """Refuse weightings that read something else, or that remember."""
        if not 0 <= self.norm_power < math.inf:
            raise UserError(f"Gramian.norm_power must be a finite number >= 0, got {self.norm_power}")
        if self.weighting is None:
            return
        from torchjd.linalg import Matrix

        name = type(self.weighting).__name__
        instead = "UPGradWeighting, MGDAWeighting, CAGradWeighting or another one of a Gram matrix"
        if hasattr(self.weighting, "reset"):
            raise UserError(
                f"Gramian: {name} keeps a memory that checkpoints would not hold; use {instead} that has none"
            )
        if Matrix in get_type_hints(self.weighting.forward).values():
            raise UserError(f"Gramian: {name} reads the gradients themselves, not their Gram matrix; use {instead}")

    def init(self, objectives: Sequence[str], weights_N: Tensor) -> State:
        """Nothing drawn; what weightings draw goes by the run's seed.

        Raises:
            UserError: the weighting is not for this many objectives.
        """
        state = {"batches": torch.zeros(()), "seed": torch.tensor(float(run_seed() % 2**24))}  # exact in float32
        if self.weighting is None:  # UPGrad weighs any number of objectives
            return state
        count = len(objectives)
        try:
            weights_N = self.weigh(torch.eye(count, dtype=torch.float64), torch.ones(count, dtype=torch.bool), state)
        except Exception as error:
            line = " ".join(str(error).split())
            raise UserError(
                f"Gramian: {type(self.weighting).__name__} cannot weigh {count} objectives: {line}"
            ) from error
        if weights_N.shape != (count,):
            raise UserError(
                f"Gramian: {type(self.weighting).__name__} gives weights of shape {tuple(weights_N.shape)} for {count} "
                "objectives; it must give one each"
            )
        return state

    def observe(self, experience: Experience, state: State) -> State:
        """Another order for weightings that draw one."""
        return state | {"batches": state["batches"] + 1}

    @override
    def weigh(self, gram_NN: Tensor, present_N: Tensor, state: State) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            seed = state.get("seed", torch.zeros(()))  # a checkpoint from before it was kept
            torch.default_generator.manual_seed(int(seed) * 1_000_003 + int(state["batches"]))
            return self._of_any_size(gram_NN, present_N)

    def _of_any_size(self, gram_NN: Tensor, present_N: Tensor) -> Tensor:
        from torchjd.aggregation import UPGradWeighting

        weighting = self.weighting or UPGradWeighting()
        try:
            weights_N: Tensor = weighting(gram_NN)
        except (ValueError, RuntimeError):  # not defined for fewer than all: then those without gradient take part
            if present_N.all():
                raise
            whole_NN = gram_NN.new_zeros(len(present_N), len(present_N))
            whole_NN[present_N.outer(present_N)] = gram_NN.flatten()
            weights_N = weighting(whole_NN)[present_N]
        return weights_N
