"""CTWA: weights that follow how well the trained signal follows each objective.

Legend: B sequences, G prompts, N objectives.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from moa_lightning.combiners.claims import CONVEX, Claim
from moa_lightning.combiners.shared.responses import ScoredResponses, scored_responses
from moa_lightning.combiners.shared.scores import ScoreCombiner
from moa_lightning.combiners.shared.weighted import FirstWeights
from moa_lightning.distributed import all_sum
from moa_lightning.errors import UserError
from moa_lightning.functional.scalarize import group_covariance, weighted_sum
from moa_lightning.schedules import Weight
from moa_lightning.signals import Signal
from moa_lightning.types import Experience, State


@dataclass(frozen=True)
class CTWA(FirstWeights, ScoreCombiner):
    """Train on the weighted sum of the scores; an objective that covaries too little with it gains weight.

    To first order an objective improves at the rate of its covariance with the signal that is trained on. This one is
    measured on each collected batch: within each prompt, the objective's score with the advantage (whose standard
    deviation is 1), averaged over the prompts of all processes, then exponentially over the batches. Where the average
    lies below the objective's target, ``log w_i += lr (target_i - average_i)``.

    Baseline and scale are those of all score combiners: the mean over the responses to the prompt is taken off,
    because a constant would be noise to the policy gradient, and what is left is divided by its standard deviation over
    the batch. So only the ratios of the weights count, and they are shown as shares. A KL penalty (``RewardKL``) is
    taken off the sum, in its units.

    Choose it when: you have first weights, and some objectives fall while others rise.
    Cost: no extra backward pass.
    Convergence: proved, to first order an objective with positive covariance improves; and globally, under a
    Polyak-Lojasiewicz condition.
    Source: Lu & Jiang 2026, "Uncovering Cross-Objective Interference in Multi-Objective Alignment", arXiv 2602.06869.
    Deviations: the weights move before the batch that they were measured on is trained on, not after; covariances
    are those of the advantage that is trained on, in whatever way it is standardised here.

    Formula: ``A = sum_i w_i s_i``, less its mean over the responses to the prompt, in standard deviations; ``log w_i +=
    eta max(target_i - c_i, 0)`` with ``c_i`` the running covariance of ``s_i`` and ``A``.
    Symbols: ``eta`` is ``lr``; ``target`` is ``targets``; ``c_i`` is ``covariances/<name>`` in the logs, its running
    mean of share ``tau``; ``w`` starts at ``weights``.
    Missing score: takes the mean of the prompt's other responses; adds 0 in prompts without any. Covariances leave
    it out.
    Watch: ``covariances/<name>`` against ``targets``: below it for long while ``weights/<name>`` rises, the objective
    cannot be had with the others.

    Args:
        targets: least covariance of each objective, in its units (times one standard deviation of the
            advantage): one number for all, or by name; an objective that is not named keeps its weight. The authors'
            published script has 0.08 to 0.15 for scores in [0, 1].
        lr: step of the logarithm of the weights, in inverse units of the targets.
        tau: share of the newest batch in the average, in (0, 1].
        weights: first weight of each objective by name, non-negative, not all 0; divided by their sum. ``None``
            takes the ``weight`` of each objective. A weight of 0 stays 0.
    """

    targets: float | dict[str, float] = 0.1
    lr: float = 0.05
    tau: float = 0.1
    weights: dict[str, Weight] | None = None

    needs: ClassVar[frozenset[Signal]] = frozenset({Signal.SCORES, Signal.GROUPS})
    claims: ClassVar[frozenset[Claim]] = CONVEX | {Claim.ONE_OBJECTIVE, Claim.SHIFT}

    def __post_init__(self) -> None:
        if not 0 < self.lr < math.inf or not 0 < self.tau <= 1:
            raise UserError(f"CTWA needs a finite lr > 0 and tau in (0, 1], got {self.lr} and {self.tau}")

    def init(self, objectives: Sequence[str], weights_N: Tensor) -> State:
        """First weights, targets by name, nothing measured.

        Raises:
            UserError: a target names no trained objective, or is not finite.
        """
        targets = self.targets if isinstance(self.targets, dict) else dict.fromkeys(objectives, self.targets)
        for name, target in targets.items():
            if name not in objectives:
                raise UserError(
                    f"CTWA.targets names '{name}', which is no trained objective; they are {', '.join(objectives)}"
                )
            if not math.isfinite(target):
                raise UserError(f"CTWA's target for '{name}' must be a finite number, got {target}")
        state = super().init(objectives, weights_N)
        targets_N = torch.tensor([float(targets.get(name, math.nan)) for name in objectives], dtype=torch.float32)
        measured_N = torch.full_like(targets_N, torch.nan)
        return state | {"log_weights": state["weights"].log(), "targets": targets_N, "covariances": measured_N}

    def resume(self, saved: State, fresh: State) -> State:
        """All that was learnt, weights included, under the configuration's targets."""
        return saved | {"targets": fresh["targets"]}

    def observe(self, experience: Experience, state: State) -> State:
        """One step of the weights, then the scale of the batch under them."""
        state = super().observe(experience, state)
        responses = scored_responses(experience)
        advantages_B, _ = self.advantages(responses, state)
        covariance_GN, known_GN = group_covariance(
            responses.scores_BN, advantages_B, responses.valid_BN, responses.group_B
        )
        sums_2N = all_sum(torch.stack([covariance_GN.sum(0), known_GN.double().sum(0)]))
        new_N = (sums_2N[0] / sums_2N[1]).to(state["covariances"])  # NaN: no prompt has this objective
        before_N = state["covariances"].where(state["covariances"].isfinite(), new_N)
        average_N = torch.where(new_N.isfinite(), before_N + self.tau * (new_N - before_N), before_N)
        behind_N = (state["targets"] - average_N).clamp(min=0).nan_to_num(0.0)
        log_weights_N = state["log_weights"] + self.lr * behind_N
        log_weights_N = log_weights_N - log_weights_N.logsumexp(0)  # shares: they cannot overflow in a long run
        learnt = {"covariances": average_N, "log_weights": log_weights_N, "weights": log_weights_N.exp()}
        return super().observe(experience, state | learnt)

    @override
    def report(self, state: State) -> dict[str, Tensor]:
        return {"covariances": state["covariances"]}

    def scalarize(self, responses: ScoredResponses, weights_N: Tensor, state: State) -> tuple[Tensor, Tensor]:
        """``sum_i w_i s_i``."""
        scores_BN, present_BN = responses.filled()
        return weighted_sum(scores_BN, weights_N, present_BN)
