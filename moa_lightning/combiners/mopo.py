"""MOPO: the primary objective as high as it goes while the others stay above their thresholds.

Legend: B sequences, N objectives; the primary one among them has multiplier 1.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from moa_lightning.combiners.base import Combined, Combiner
from moa_lightning.combiners.claims import CONVEX, Claim
from moa_lightning.combiners.duals import DualUpdate, Projected
from moa_lightning.combiners.mopo_thresholds import (
    adapted,
    corrected,
    evaluation_memory,
    judged,
    require_probabilities,
    since_evaluation,
    threshold_memory,
    warn_of_unlabelled,
    warn_of_votes,
)
from moa_lightning.combiners.mopo_values import Judged, has_own_values, judged_responses, own_responses
from moa_lightning.combiners.shared.constraints import constrained, curves, spread, under_present_names
from moa_lightning.distributed import all_sum
from moa_lightning.errors import UserError
from moa_lightning.signals import Signal, Signals
from moa_lightning.types import Experience, State


@dataclass(frozen=True)
class MOPO(Combiner):
    """Maximise the primary objective's win probability subject to a threshold on each secondary one's.

    The score is the importance weight of each response: the ratio of the constrained optimum to the reference,
    ``rho = exp((p + lambda q) / tau) / E_ref exp(...)``, with mean 1. It goes with loss ``WeightedLikelihood``. The
    multipliers ``lambda`` take one step per collected batch; there is one for each objective, for the whole data set.

    The mean win probability under ``rho`` (curve ``believed``) comes from the labels that made ``rho``. Where these are
    single votes it is too high, because ``rho`` follows each vote, also those that are accidents. No estimate from one
    vote a prompt can tell a preference from a coin; only what carries over to other prompts can. So a threshold is
    compared with the policy's own mean win probability, before it is trained on the batch: ``dual_values`` says how,
    and when that is unbiased. What it is judged by in the end is ``held_out``, the mean on the validation prompts.

    On rollouts the policy's own mean is that of its responses, and new at each batch. It says something where rewards
    compare with fixed responses (``WinProbability``, ``PairwisePreference`` with a ``baseline``); for other objectives,
    whose rivals are the policy's own responses, it would be .5 by construction, so the mean under ``rho`` is taken.

    Choose it when: one objective matters most, and the others need a least win probability. Cost: no extra backward
    pass. Convergence: stated, to the front wherever it can be reached. Source: Agnihotri et al., "Multi-Objective
    Preference Optimization", arXiv 2505.10892, Algorithm 1. Deviations: the multipliers follow the policy's own values
    unless ``dual_values`` says otherwise; the ratio is the normalised one (the paper's Eq. 3 is no density ratio); it
    is normalised among the responses to each prompt unless ``normalize`` says otherwise;
    the robust value is off unless ``radius`` is set, because the paper's 0.15 lies far above the slack that its
    adaptive thresholds leave. A prompt counts in the values of an objective if all of its responses have a label; in
    the ratio a missing one is the mean of the others, and an objective without any label there has no term.

    Formula: ``rho = exp((p + lambda . q) / tau) / E_ref exp((p + lambda . q) / tau)``; ``lambda <- [lambda + lr (b -
    G)]+``.
    Symbols: ``p`` and ``q`` are ``wins_BN`` of the primary objective and the others; ``lambda`` is ``duals/<name>`` in
    the logs; ``b`` is ``thresholds``; ``G`` is ``values/<name>``; ``t0`` is ``refresh_interval``; epsilon is
    ``radius``.
    Missing score: takes the mean of the prompt's others in ``rho``; the prompt is left out of that objective's values.
    Watch: ``values/<name>`` against ``thresholds/<name>``; ``believed/<name>`` far above ``held_out/<name>`` means that
    the labels do not carry over to other prompts; ``ess`` near 1 response a prompt means that ``tau`` is small.

    Args:
        primary: name of the primary objective; ``None`` is the first.
        thresholds: least mean win probability of each secondary objective by name, in (0, 1); an objective that is
            not named has no constraint and is only watched. ``None`` sets adaptive thresholds.
        beta: adaptive thresholds are this share of the reference's value, averaged over the batches since its refresh.
        refresh_interval: collected batches between two refreshes: that of reference ``LaggedCopy``, which counts
            optimiser steps, times ``accumulate_grad_batches``.
        tau: strength of the KL regularisation towards the reference, in units of win probability.
        radius: of the KL ball of the robust value, in nats; 0 is the plain mean.
        dual: how the multipliers move: ``Projected``, ``Optimistic``, ``PID``, ``LogPID``, ``Exponential`` or
            ``LogBarrier``.
        dual_delay: batches before the multipliers move.
        normalize: whose responses share one normalisation: each ``prompt``'s, or the ``batch``'s on a process.
        patience: batches in the means that thresholds are judged by. A warning names one that even the best response
            to each prompt would miss, or that stays violated as long again with its multiplier at its largest.
        dual_values: what moves the multipliers. ``policy``: the policy's own values on the batch, unbiased in the first
            pass over prompts that the supervised training before it has not read either, and on rollouts; on others it
            may lie off to either side. ``held_out``: the believed values plus the distance from these to
            the policy's own on the validation prompts, as the last evaluation found it; needs many evaluations in a
            run. ``optimum``: the believed values, as in the paper, unbiased if all responses have labels that are
            probabilities and the policy learns what ``rho`` promises. On rollouts that is too high by far: the optimum
            has the choice among the responses to a prompt, the policy has not.
    """

    primary: str | None = None
    thresholds: dict[str, float] | None = None
    beta: float = 0.9995
    refresh_interval: int = 500
    tau: float = 0.08
    radius: float = 0.0
    dual: DualUpdate = field(default_factory=Projected)
    dual_delay: int = 0
    normalize: Literal["prompt", "batch"] = "prompt"
    patience: int = 200
    dual_values: Literal["policy", "held_out", "optimum"] = "policy"

    needs: ClassVar[frozenset[Signal]] = frozenset({Signal.WINS})
    claims: ClassVar[frozenset[Claim]] = CONVEX

    def __post_init__(self) -> None:
        """Validate hyperparameters."""
        if not self.tau > 0 or not 0 <= self.radius < math.inf or not 0 < self.beta <= 1:
            got = f"{self.tau}, {self.radius} and {self.beta}"
            raise UserError(f"MOPO needs tau > 0, radius >= 0 and beta in (0, 1], got {got}")
        if self.refresh_interval < 1 or self.patience < 1 or self.dual_delay < 0:
            raise UserError("MOPO needs refresh_interval and patience of at least 1, and dual_delay of at least 0")
        require_probabilities(self.thresholds or {})

    def init(self, objectives: Sequence[str], weights_N: Tensor) -> State:
        """First multipliers, thresholds by name."""
        state = constrained(self, self.primary, self.thresholds, self.dual, objectives)
        unknown_N = torch.full_like(state["primary"], torch.nan)
        return state | {
            "chi": torch.full_like(unknown_N, torch.inf),
            "believed": unknown_N,  # values of the optimum by the labels that made it
            "labelled": unknown_N.clone(),  # share of the last batch's prompts that counted in the values
            "evaluates_wins": torch.zeros_like(unknown_N),  # whether evaluations give win probabilities
            **evaluation_memory(len(objectives)),
            **threshold_memory(len(objectives)),
        }

    @property
    def gives_weights(self) -> bool:
        """True."""
        return True

    def resume(self, saved: State, fresh: State) -> State:
        """All that was learnt, under the configuration's primary objective and, if they are fixed, thresholds."""
        settings = ("primary", "thresholds") if self.thresholds is not None else ("primary",)
        saved = under_present_names(saved)
        # Another dual step than the checkpoint's begins with its own memory.
        return {name: saved.get(name, value) for name, value in fresh.items()} | {n: fresh[n] for n in settings}

    def observe(self, experience: Experience, state: State) -> State:
        """One step of the multipliers on a collected batch, in the order of Algorithm 1: chi, then lambda."""
        batch, names = judged_responses(experience, self.normalize), experience.rewards.trained_names
        if state["batches"] == 0 and experience.log_policy_B is not None and experience.moving_BN is None:
            warn_of_votes(batch, names)
        policy_B = batch.policy(state["primary"] + state["duals"], self.tau)
        believed_N, believed_chi_N = batch.values(policy_B, self.radius)
        values_N, chi_N, own_N = believed_N, believed_chi_N, has_own_values(experience)
        own = batch
        if experience.log_policy_B is not None and self.dual_values == "policy":
            # The policy learnt its weights from other prompts, so this batch's labels are independent of them.
            own = own_responses(experience)
            values_N, chi_N = own.values(own.choice(experience.log_policy_B), self.radius)
            values_N, chi_N = values_N.where(own_N, believed_N), chi_N.where(own_N, believed_chi_N)
        # The correction is that of the plain mean: what a radius takes off stays off.
        plain_N = batch.values(policy_B, 0.0)[0] if self.radius else believed_N
        moving_N = values_N
        if experience.log_policy_B is not None and self.dual_values == "held_out":
            moving_N = believed_N + state["gap"]
            values_N = (state["held_out"] + believed_N - plain_N).where(own_N, believed_N)
        state = state | {"values": values_N, "chi": chi_N, "believed": believed_N, "labelled": batch.labelled()}
        state |= since_evaluation(state, plain_N) | spread(state, own.wins_BN, own.complete_BN)
        state["evaluates_wins"] = own_N.float()
        return self._step(batch, moving_N, state, names)

    def _step(self, batch: Judged, moving_N: Tensor, state: State, names: Sequence[str]) -> State:
        """State after the step of the multipliers that these values ask for, with thresholds renewed and judged."""
        if self.thresholds is None:
            reference_N, _ = batch.values(batch.prior(), self.radius)
            state |= adapted(state, reference_N, self.beta, self.refresh_interval)
        slack_N = (moving_N - state["thresholds"]).where(state["primary"] == 0, torch.nan)
        if state["batches"] >= self.dual_delay:
            state |= self.dual.stepped(state, slack_N)
        bound_N = slack_N.isfinite() & state["values"].isfinite()
        state |= judged(state, batch.attainable(), bound_N, self.dual, self.patience, self.radius, names)
        warn_of_unlabelled(state, self.patience, names)
        return state | {"batches": state["batches"] + 1}

    def evaluated(self, values_N: Tensor, state: State) -> State:
        """The values on held-out prompts, where these are win probabilities, and how far the believed ones lie off."""
        return state | corrected(state, values_N.float().where(state["evaluates_wins"] > 0, torch.nan))

    def report(self, state: State) -> dict[str, Tensor]:
        """Multipliers, thresholds, the values that they are compared with, and what else is known of these."""
        return curves(state) | {name: state[name] for name in ("believed", "held_out", "labelled")}

    def combine(self, signals: Signals, state: State) -> Combined:
        """The importance weight of each response: mean 1 over the batch, and each prompt as much as any other."""
        weights_N = state["primary"] + state["duals"]
        policy_B = judged_responses(signals, self.normalize).policy(weights_N, self.tau)
        count, total = all_sum(torch.stack([torch.ones_like(policy_B).sum(), policy_B.sum()]))
        return Combined(policy_B * (count / total.clamp(min=1.0)), weights_N / weights_N.sum())
