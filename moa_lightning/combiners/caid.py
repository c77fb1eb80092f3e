"""CAID: multipliers that are solved for on responses of the reference, before the policy moves.

Legend: N objectives; the primary one has multiplier 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from moa_lightning.combiners.caid_samples import solved, with_responses
from moa_lightning.combiners.claims import CONVEX, Claim
from moa_lightning.combiners.constraints import at_its_largest, constrained, curves, watched, windowed
from moa_lightning.combiners.duals import DualUpdate, Projected
from moa_lightning.combiners.responses import ScoredResponses
from moa_lightning.combiners.scores import ResponseCombiner
from moa_lightning.signals import Signal
from moa_lightning.types import Experience, State


@dataclass(frozen=True)
class CAID(ResponseCombiner):
    """Maximise the primary objective, subject to a least mean value of each of the others; the multipliers come first.

    The best policy for given multipliers has a closed form, so the dual is a function of the reference alone. It is
    minimised once, on the responses of the first batches, in which the policy stands still; trained is then ``s_1 +
    sum_j lambda_j s_j`` less the KL charge, whose coefficient is the dual's ``beta``. With ``interval`` dual steps
    follow, which correct what a few responses, or a policy short of the best, leave wrong.

    Choose it when: as ``Lagrangian``, but with multipliers that are known before the first update. Cost: some batches
    without training, a small convex problem; no extra backward pass. Convergence: the papers prove a smooth convex dual
    and, with ``interval``, an optimum up to what the policy can express. Source: Huang et al., "One-Shot Safety
    Alignment for Large Language Models via Optimal Dualization", NeurIPS 2024, arXiv 2405.19544; with ``interval``
    Zhang et al., "Alignment of large language models with constrained learning" (CAID), NeurIPS 2025, arXiv 2505.19387.
    Deviations: Newton steps on the dual; a coefficient that adapts (``RewardKL.target``) has the dual solved anew;
    ``interval`` batches stand for training the policy to its best, and it goes on from where it is; the penalty of
    cut-off responses is charged once, to the primary objective.

    Args:
        thresholds: least mean value by name, in the objective's own units (after its transform, without penalties and
            KL); objectives not named are only watched. ``None`` asks of each what the reference has.
        primary: name of the objective to maximise; ``None`` is the first.
        reference_batches: batches to solve on; the policy moves from the last of them on. Few responses to a prompt
            make the reference look as if it could do little else: have several (``source.num_generations``).
        interval: batches from one dual step to the next; ``None`` leaves the multipliers as they are solved.
        window: batches that values are averaged over, each response alike.
        dual: how the multipliers move with ``interval``, and the largest that one may be.
        patience: dual steps violated, with the multiplier at its largest, until a warning names the threshold.
    """

    thresholds: dict[str, float] | None = None
    primary: str | None = None
    reference_batches: int = 4
    interval: int | None = None
    window: int = 8
    dual: DualUpdate = field(default_factory=Projected)
    patience: int = 20

    needs: ClassVar[frozenset[Signal]] = frozenset({Signal.SCORES, Signal.GROUPS, Signal.SAMPLES})
    requires_kl: ClassVar[bool] = True  # without it the best policy has no closed form
    claims: ClassVar[frozenset[Claim]] = CONVEX | {Claim.ONE_OBJECTIVE}

    def __post_init__(self) -> None:
        """Refuse values without meaning."""
        if min(self.reference_batches, self.window, self.patience, 1 if self.interval is None else self.interval) < 1:
            raise ValueError("CAID needs reference_batches, window, patience and (unless null) interval of at least 1")

    def init(self, objectives: Sequence[str], weights_N: Tensor) -> State:
        """No multipliers yet, thresholds by name."""
        state = constrained(self, self.primary, self.thresholds, self.dual, objectives)
        return super().init(objectives, weights_N) | {
            **state,
            "duals": torch.zeros_like(state["duals"]),
            "weights": state["primary"].clone(),
            "window": torch.zeros(self.window, 2, len(objectives)),
            "samples": torch.zeros(0, len(objectives) + 3),
            "beta": torch.tensor(torch.nan),  # that the dual was solved for; NaN: not yet
        }

    def resume(self, saved: State, fresh: State) -> State:
        """All that was learnt; under another primary objective or other thresholds the dual is solved anew."""
        same = saved if saved["window"].shape == fresh["window"].shape else saved | {"window": fresh["window"]}
        state = {name: same.get(name, value) for name, value in fresh.items()} | {"primary": fresh["primary"]}
        asked = ("primary",) if self.thresholds is None else ("primary", "thresholds")
        kept = all(torch.equal(saved[name].nan_to_num(torch.inf), fresh[name].nan_to_num(torch.inf)) for name in asked)
        return state if kept else state | {name: fresh[name] for name in ("thresholds", "beta", "warned")}

    def observe(self, experience: Experience, state: State) -> State:
        """Keep responses of the reference, solve the dual on them, then step where asked for."""
        window_W2N, values_N = windowed(state["window"], experience)
        state = state | {"window": window_W2N, "values": values_N, "batches": state["batches"] + 1}
        since, names = int(state["batches"]) - self.reference_batches, experience.rewards.trained_names
        if since <= 0 or len(state["samples"]) == 0:
            state["samples"] = with_responses(state["samples"], experience)
        assert experience.kl_coefficient is not None  # requires_kl
        ready, beta = since >= 0 and len(state["samples"]) > 0, torch.tensor(experience.kl_coefficient)
        if ready and (state["beta"].isnan() or (self.interval is None and beta != state["beta"])):
            state |= solved(state, beta, self.thresholds is not None, self.dual.largest, names)
        elif ready and self.interval is not None and since % self.interval == 0:
            state |= self.dual.stepped(state, values_N - state["thresholds"])
            message = at_its_largest("CAID", state, names, self.dual, self.window, f"{self.patience} dual steps")
            state |= watched(state, values_N, values_N.isfinite(), self.dual, self.patience, message)
        state["weights"] = (state["primary"] + state["duals"]) / (1 + state["duals"].sum())
        state = super().observe(experience, state)
        return state if ready else state | {"spread": torch.full_like(beta, torch.inf)}  # stand still

    def report(self, state: State) -> dict[str, Tensor]:
        """Multipliers, thresholds, and the values that they are compared with."""
        return curves(state)

    def scalarize(self, responses: ScoredResponses, weights_N: Tensor, state: State) -> tuple[Tensor, Tensor]:
        """The primary objective's score and the others' by their multipliers, less the penalty, once."""
        filled_BN, present_BN = responses.unpenalised().filled()
        shares_BN = present_BN * (state["primary"] + state["duals"]).to(filled_BN)
        penalty_B = 0.0 if responses.penalty_B is None else responses.penalty_B
        score_B, total_B1 = (filled_BN * shares_BN).sum(1) - penalty_B, shares_BN.sum(1, keepdim=True)
        return score_B, shares_BN / total_B1.where(total_B1 > 0, 1.0)
