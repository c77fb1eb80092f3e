"""DynamicWeights: weights that gradients move, and an update that the front's growth strengthens.

Legend: B sequences, T tokens, N objectives, A points of the front so far.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from moa_lightning.combiners.base import Combined
from moa_lightning.combiners.claims import CONVEX, Claim
from moa_lightning.combiners.shared.gradients import Place, surrogate_gramian
from moa_lightning.combiners.shared.named import named_point, named_weights
from moa_lightning.combiners.shared.weighted import FirstWeights
from moa_lightning.errors import UserError
from moa_lightning.functional.dynamic import front_factor, grow_front, influence, mirror_step
from moa_lightning.schedules import Weight
from moa_lightning.signals import GradientPlace, Signal, Signals
from moa_lightning.types import State

MOST = 12  # objectives; the hypervolume's cost grows exponentially with them


@dataclass(frozen=True)
class DynamicWeights(FirstWeights):
    """Train on the weighted sum of the advantages, with weights that move during the run.

    By gradients: every ``interval`` minibatches an objective gains weight as far as a step along all gradients improves
    it, ``log w_i += lr g_i . sum_j g_j``, so the weights go to what can still be learnt without harm to the rest.
    By the front: updates are multiplied by ``0.5 + 1.5 tanh(growth)``, growth being what the last evaluation added to
    the hypervolume of all evaluations. Each can be had without the other.

    Choose it when: objectives are learnt at different speeds. Cost: at each look what ``at`` says: one backward pass
    through the head, or N; none with ``lr`` 0. Convergence: none stated.
    Source: Lu et al., "Learning to Optimize Multi-Objective Alignment Through Dynamic Reward Weighting", 2025,
    arXiv 2509.11452. Deviations: gradients at the representation unless ``at`` says otherwise, inner products in units
    of the mean squared norm; the weights move before the update that they were measured on, and not at each, which is
    cheap; the factor is on the advantages, because on the rewards it would be standardised away.

    Formula: ``A = f sum_i w_i A_i``; at each look ``log w_i += eta g_i . sum_j g_j``, then ``sum_i w_i = 1``; ``f = 0.5
    + 1.5 tanh(growth / growth_scale)``.
    Symbols: ``eta`` is ``lr``; ``w`` starts at ``weights`` and is ``weights/<name>`` in the logs; ``f`` is
    ``front_factor/<name>``; ``g_i`` is the gradient of objective i's surrogate where ``at`` says.
    Missing score: adds 0 there, to the gradient as well.
    Watch: ``weights/<name>``: an objective that is learnt gives weight away; one at 0 for long has been given up, so
    lower ``lr``.

    Args:
        lr: step of the logarithm of the weights at each look; 0 keeps the weights.
        weights: first weight of each objective by name, non-negative, not all 0; divided by their sum. ``None``
            takes the ``weight`` of each objective. A weight of 0 stays 0.
        interval: minibatches from one look at the gradients to the next; 1 is the paper's.
        at: where gradients are taken: ``representation``, ``last_layer`` or all trained ``parameters``.
        growth_scale: growth of the hypervolume at an evaluation, in the product of the objectives' units, at which
            the factor reaches 1.64. ``None`` does not look at the front; the paper has 1.
        reference: point that the hypervolume is counted from, by name, in the objectives' units; an objective that is
            not named counts from the first evaluation, so that only what is better in it adds anything.
    """

    lr: float = 0.1
    weights: dict[str, Weight] | None = None
    interval: int = 10
    at: Place = "representation"
    growth_scale: float | None = None
    reference: dict[str, float] | None = None

    needs: ClassVar[frozenset[Signal]] = frozenset({Signal.ADVANTAGES, Signal.RATIO, Signal.GRAMIAN})
    claims: ClassVar[frozenset[Claim]] = CONVEX | {Claim.COMMON_SCALE}

    def __post_init__(self) -> None:
        scale = 1.0 if self.growth_scale is None else self.growth_scale
        if not (0 <= self.lr < math.inf and 0 < scale < math.inf and self.interval >= 1):
            raise UserError("DynamicWeights needs finite lr >= 0 and growth_scale > 0 (or null), and interval >= 1")

    @property
    @override
    def gradients_at(self) -> GradientPlace:
        return GradientPlace(self.at)

    def init(self, objectives: Sequence[str], weights_N: Tensor) -> State:
        """First weights, no evaluation."""
        if self.growth_scale is not None and len(objectives) > MOST:
            raise UserError(
                f"DynamicWeights computes hypervolumes of at most {MOST} objectives, got {len(objectives)}; set "
                "growth_scale to null, or make some objectives eval_only"
            )
        return {
            "log_weights": named_weights(self.weights, objectives, weights_N).log(),
            "since_look": torch.zeros(()),
            "factor": torch.ones(()),
            "reference": named_point("DynamicWeights.reference", self.reference, objectives, "to count from the first"),
            "front": torch.zeros(0, len(objectives)),
        }

    def observe_evaluation(self, values_N: Tensor, state: State) -> State:
        """The factor for the updates up to the next evaluation; the first one has nothing to be compared with."""
        if self.growth_scale is None or not values_N.isfinite().all():
            return state
        values_N = values_N.float().cpu()
        reference_N = state["reference"].where(state["reference"].isfinite(), values_N)
        front_AN, growth = grow_front(state["front"], values_N, reference_N)
        factor = front_factor(growth, self.growth_scale) if len(state["front"]) else 1.0
        return state | {"factor": torch.tensor(factor), "reference": reference_N, "front": front_AN}

    def report(self, state: State) -> dict[str, Tensor]:
        """The factor, alike for all."""
        return {"front_factor": state["factor"].expand_as(state["log_weights"])} if self.growth_scale else {}

    def resume(self, saved: State, fresh: State) -> State:
        """All that was learnt, counted from the configuration's reference where it names one; a factor if it asks."""
        kept = saved if self.growth_scale else saved | {"factor": fresh["factor"]}
        return kept | {"reference": fresh["reference"].where(fresh["reference"].isfinite(), saved["reference"])}

    def combine(self, signals: Signals, state: State) -> Combined:
        """The weighted sum times the factor; at a look, under weights that have moved on this minibatch's gradients."""
        assert signals.advantages_BTN is not None
        log_weights_N, since_look = state["log_weights"], state["since_look"]
        if self.lr and since_look == 0:
            influence_N = influence(surrogate_gramian(signals)).nan_to_num(0.0, 0.0, 0.0)
            log_weights_N = mirror_step(log_weights_N.double(), influence_N, self.lr).float()
        weights_N = log_weights_N.exp().to(signals.advantages_BTN.device)
        score_BT = (signals.advantages_BTN.where(signals.present_BTN(), 0.0) * weights_N).sum(-1)
        learnt = {"log_weights": log_weights_N, "since_look": (since_look + 1) % self.interval}
        return Combined(score_BT * float(state["factor"]), weights_N, state=state | learnt)
