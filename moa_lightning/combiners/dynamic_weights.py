"""DynamicWeights: weights that gradients move, and an update that the front's growth strengthens.

Legend: B sequences, T tokens, N objectives, A points of the front so far.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moa_lightning.combiners.base import Combined
from moa_lightning.combiners.claims import CONVEX, Claim
from moa_lightning.combiners.gradients import Place, surrogate_gramian
from moa_lightning.combiners.weighted import FirstWeights
from moa_lightning.combiners.weights import named_point, named_weights
from moa_lightning.functional.dynamic import front_factor, influence, mirror_step
from moa_lightning.functional.pareto import hypervolume, non_dominated
from moa_lightning.schedules import Weight
from moa_lightning.signals import GradientPlace, Signal, Signals
from moa_lightning.types import State

MOST = 12  # objectives; the hypervolume's cost grows exponentially with them, from here on to minutes


@dataclass(frozen=True)
class DynamicWeights(FirstWeights):
    """Train on the weighted sum of the advantages, with weights that move during the run.

    Gradient-based: at each update an objective gains weight as far as a step along all gradients improves it,
    ``log w_i += lr g_i . sum_j g_j``, so the weights go to what can still be learnt without harm to the rest.
    Hypervolume-guided: the whole update is multiplied by ``0.5 + 1.5 tanh(growth)``, growth being what the last
    evaluation added to the hypervolume of all evaluations. Each can be had without the other.

    Choose it when: objectives are learnt at different speeds. Cost: as ``at`` says: one backward pass through the
    head, or N; none with ``lr`` 0. Convergence: none stated.
    Source: Lu et al., "Learning to Optimize Multi-Objective Alignment Through Dynamic Reward Weighting", 2025,
    arXiv 2509.11452. Deviations: gradients at the representation unless ``at`` says otherwise, their inner products in
    units of the mean squared norm; the weights move before the update that they were measured on; the factor is on
    the advantages, because on the rewards it would be standardised away.

    Args:
        lr: step of the logarithm of the weights; 0 keeps the weights.
        weights: first weight of each objective by name, non-negative, not all 0; divided by their sum. ``None``
            takes the ``weight`` of each objective. A weight of 0 stays 0.
        at: where gradients are taken: ``representation``, ``last_layer`` or all trained ``parameters``.
        growth_scale: growth of the hypervolume at an evaluation, in the product of the objectives' units, at which
            the factor reaches 1.64. ``None`` does not look at the front; the paper has 1.
        reference: point that the hypervolume is counted from, by name, in the objectives' units; an objective that is
            not named counts from the first evaluation, so that only what is better in it adds anything.
    """

    lr: float = 0.05
    weights: dict[str, Weight] | None = None
    at: Place = "representation"
    growth_scale: float | None = None
    reference: dict[str, float] | None = None

    needs: ClassVar[frozenset[Signal]] = frozenset({Signal.ADVANTAGES, Signal.RATIO, Signal.GRAMIAN})
    claims: ClassVar[frozenset[Claim]] = CONVEX | {Claim.COMMON_SCALE}

    def __post_init__(self) -> None:
        """Refuse values without meaning."""
        if not 0 <= self.lr < math.inf or not (self.growth_scale is None or 0 < self.growth_scale < math.inf):
            got = f"{self.lr} and {self.growth_scale}"
            raise ValueError(f"DynamicWeights needs a finite lr >= 0 and growth_scale > 0 (or null), got {got}")

    @property
    def gradients_at(self) -> GradientPlace:
        """``at``."""
        return GradientPlace(self.at)

    def init(self, objectives: Sequence[str], weights_N: Tensor) -> State:
        """First weights, no evaluation."""
        if self.growth_scale is not None and len(objectives) > MOST:
            raise ValueError(
                f"DynamicWeights computes hypervolumes of at most {MOST} objectives, got {len(objectives)}; set "
                "growth_scale to null, or make some objectives eval_only"
            )
        why_not = "to count from the first evaluation"
        return {
            "log_weights": named_weights(self.weights, objectives, weights_N).log(),
            "factor": torch.ones(()),
            "reference": named_point("DynamicWeights.reference", self.reference, objectives, why_not),
            "front": torch.zeros(0, len(objectives)),
        }

    def evaluated(self, values_N: Tensor, state: State) -> State:
        """The factor for the updates up to the next evaluation; the first one has nothing to be compared with."""
        if self.growth_scale is None or not values_N.isfinite().all():
            return state
        values_N = values_N.float().cpu()
        reference_N = state["reference"].where(state["reference"].isfinite(), values_N)
        before_AN, after_AN = state["front"], torch.cat([state["front"], values_N.unsqueeze(0)])
        growth = hypervolume(after_AN, reference_N) - hypervolume(before_AN, reference_N)
        factor = front_factor(max(growth, 0.0), self.growth_scale) if len(before_AN) else 1.0
        front_AN = after_AN[non_dominated(after_AN)].unique(dim=0)
        return state | {"factor": torch.tensor(factor), "reference": reference_N, "front": front_AN}

    def report(self, state: State) -> dict[str, Tensor]:
        """The factor, the same for every objective."""
        return {} if self.growth_scale is None else {"front_factor": state["factor"].expand_as(state["log_weights"])}

    def resume(self, saved: State, fresh: State) -> State:
        """All that was learnt, counted from the configuration's reference where it names one."""
        reference_N = fresh["reference"].where(fresh["reference"].isfinite(), saved["reference"])
        return saved | {"reference": reference_N}

    def combine(self, signals: Signals, state: State) -> Combined:
        """The weighted sum times the factor, under weights that have moved on this minibatch's gradients."""
        assert signals.advantages_BTN is not None
        log_weights_N = state["log_weights"]
        if self.lr:
            influence_N = influence(surrogate_gramian(signals)).nan_to_num(0.0, 0.0, 0.0)
            log_weights_N = mirror_step(log_weights_N.double(), influence_N, self.lr).float()
        weights_N = log_weights_N.exp().to(signals.advantages_BTN.device)
        score_BT = (signals.advantages_BTN.where(signals.present_BTN(), 0.0) * weights_N).sum(-1)
        return Combined(score_BT * float(state["factor"]), weights_N, state=state | {"log_weights": log_weights_N})
