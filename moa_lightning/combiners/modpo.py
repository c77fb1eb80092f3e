"""MODPO: DPO on one objective's labels, the other objectives as a margin.

Legend: B sequences, N objectives.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from moa_lightning.combiners.base import Combined
from moa_lightning.combiners.claims import Claim
from moa_lightning.combiners.shared.weighted import Weighted
from moa_lightning.errors import UserError
from moa_lightning.functional.preference import group_sum
from moa_lightning.schedules import Weight
from moa_lightning.signals import Signal, Signals
from moa_lightning.types import State


@dataclass(frozen=True)
class MODPO(Weighted):
    """Pairs are ordered by the primary objective; how much the others already speak for a response is taken off.

    The loss is ``-log sigmoid((beta (D_w - D_l) - sum_{j != k} w_j (r_j(y_w) - r_j(y_l))) / w_k)``, for any number of
    objectives; it goes with loss ``PairwiseLogistic``. A margin's reward ``r_j`` is whatever its objective's
    reward says of the candidates: a model or function, a column of the data (``FromScores``), or the implicit reward of
    an adapter trained with DPO (``ImplicitReward``). With all the weight on the primary objective this is DPO.

    Choose it when: you have weights, pairs for one objective and rewards for the others.
    Cost: no extra backward pass.
    Convergence: proved, that its optimum is that of RLHF on the weighted sum.
    Source: Zhou et al. 2023, "Beyond One-Preference-Fits-All Alignment: Multi-Objective Direct Preference
    Optimization", arXiv 2310.03708. Deviation: a prompt where an objective could not judge
    every response has no margin from it, and no pairs if that is the primary one.

    Formula: ``loss = -log sigmoid((beta (D_w - D_l) - sum_j w_j (r_j(y_w) - r_j(y_l))) / w_k)``, j over all but k.
    Symbols: ``k`` is ``primary``; ``w`` is ``weights``; ``D`` is ``log pi - log pi_ref`` of a response; ``beta`` is
    that of ``PairwiseLogistic``; ``r_j`` is ``scores_BN[:, j]``.
    Missing score: gives no margin to any pair of its prompt; of the primary objective, the prompt has no pairs.
    Watch: ``pair_accuracy`` and ``pair_margin``; on held-out prompts the win probability of each objective. ``pairs``
    near 0: labels are missing or all alike.

    Args:
        primary: the objective whose labels order the pairs; ``None`` is the first.
        weights: weight of each objective by name, non-negative, divided by their sum; the primary one's above 0.
            ``None`` takes the ``weight`` of each objective.
    """

    primary: str | None = None
    weights: dict[str, Weight] | None = None

    needs: ClassVar[frozenset[Signal]] = frozenset({Signal.WINS, Signal.SCORES, Signal.PAIRS})
    claims: ClassVar[frozenset[Claim]] = frozenset({Claim.SIMPLEX, Claim.PERMUTATION, Claim.SHIFT})

    def init(self, objectives: Sequence[str], weights_N: Tensor) -> State:
        """Check names and weights.

        Raises:
            UserError: the primary objective is unknown or has no weight, or the weights do not match the objectives.
        """
        primary = objectives[0] if self.primary is None else self.primary
        if primary not in objectives:
            raise UserError(f"MODPO.primary '{primary}' is no trained objective; they are {', '.join(objectives)}")
        is_primary_N = torch.tensor([float(name == primary) for name in objectives])
        return self.proceed(objectives, weights_N, 0.0, {"primary": is_primary_N})

    def proceed(self, objectives: Sequence[str], weights_N: Tensor, progress: float, state: State) -> State:
        """The weights at this progress, the primary one's above 0."""
        state = super().proceed(objectives, weights_N, progress, state)
        if float(state["weights"] @ state["primary"]) == 0:
            primary, when = (
                objectives[int(state["primary"].argmax())],
                f" at progress {progress:.3g}" if progress else "",
            )
            raise UserError(
                f"MODPO divides by the weight of the primary objective '{primary}'; give it one above 0{when}"
            )
        return state

    @override
    def resume(self, saved: State, fresh: State) -> State:
        return fresh

    def combine(self, signals: Signals, state: State) -> Combined:
        """The primary objective's win probability as score, and the margin of the others."""
        assert signals.wins_BN is not None and signals.scores_BN is not None and signals.group_B is not None
        weights_N = state["weights"].to(signals.wins_BN.device)
        is_primary_N = state["primary"].to(signals.wins_BN.device)
        weight = float(state["weights"] @ state["primary"])
        wins_BN = _of_complete_prompts(signals.wins_BN.float(), signals.wins_BN.isfinite(), signals.group_B)
        scores_BN = _of_complete_prompts(signals.scores_BN, signals.valid_BN, signals.group_B)
        margin_B = (scores_BN * weights_N * (1 - is_primary_N)).sum(1)
        score_B = (wins_BN * is_primary_N).sum(1).where(signals.mask_BT.any(1), 0.0)
        return Combined(score_B, weights_N, margin_B, weight)


def _of_complete_prompts(values_BN: Tensor, valid_BN: Tensor, group_B: Tensor) -> Tensor:
    """The values, and 0 for all responses to a prompt where an objective lacks one: then it tells none apart."""
    lacking_GN = group_sum((~valid_BN).float(), group_B)
    return values_BN.where(lacking_GN[group_B] == 0, 0.0)
