"""Lagrangian: the primary objective as high as it goes while the others stay above thresholds (PPO-Lag).

Legend: B sequences, T tokens, N objectives, W batches of a window; the primary objective has multiplier 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from moa_lightning.combiners.base import Combined, Combiner
from moa_lightning.combiners.claims import CONVEX, Claim
from moa_lightning.combiners.duals import DualUpdate, LogPID
from moa_lightning.combiners.shared.constraints import (
    constraint_curves,
    init_constraints,
    rename_old_entries,
    slide_window,
    stuck_message,
    update_spreads,
    warn_if_stuck,
)
from moa_lightning.errors import UserError
from moa_lightning.signals import Signal, Signals
from moa_lightning.types import Experience, State


@dataclass(frozen=True)
class Lagrangian(Combiner):
    """Maximise the primary objective, subject to a least mean value of each of the others.

    Trains on ``(A_1 + sum_j lambda_j A_j) / (1 + sum_j lambda_j)``; a multiplier grows while its objective's mean lies
    below its threshold. The weights sum to 1, so the KL penalty is as strong whatever the multipliers are: where they
    settle, no policy that meets the thresholds and is no further from the reference has a higher primary value. This
    is exact with ``LossKL`` or ``standardize: false``: standardising divides the penalty in each objective too.

    Choose it when: one objective matters most, and the others need a least mean reward.
    Cost: no extra backward pass.
    Convergence: none stated. Steps that only sum violations swing around the threshold; ``LogPID`` settles near it.
    Source: Dai et al., "Safe RLHF", ICLR 2024, arXiv 2310.12773 (PPO-Lag), a cost being an objective of scale -1.
    Deviations: any number of constraints; an objective that could not score a response adds 0 there; the multipliers
    move by ``LogPID`` on the last batch. The paper's are ``Exponential`` on the whole window (``dual_window: 8``).

    Formula: ``A = (A_1 + sum_j lambda_j A_j) / (1 + sum_j lambda_j)``; ``lambda_j`` moves with ``b_j - J_j``.
    Symbols: ``lambda`` is ``duals/<name>`` in the logs; ``b`` is ``thresholds``; ``J`` is ``values/<name>``, the mean
    over the last batches; the index 1 is ``primary``.
    Missing score: adds 0 there; ``J`` is the mean over the responses that have one.
    Watch: ``values/<name>`` against ``thresholds/<name>``, and ``duals/<name>``: at its largest for long, the threshold
    cannot be met; circling, lower the dual step's gains. ``thresholds_held/<name>`` sums it up.

    Args:
        thresholds: least mean value by name, in the objective's own units (after its transform, without penalties and
            KL); objectives not named are only watched. ``None`` asks of each what it had in the first ``window``.
        primary: name of the objective to maximise; ``None`` is the first.
        dual: how the multipliers move, once per collected batch.
        window: batches that reported values, the warning and ``thresholds: null`` average over, each response alike.
        dual_window: last batches of the window that the multipliers follow; each older one delays them.
        dual_delay: batches before the multipliers move.
        patience: batches violated, with the multiplier at its largest, until a warning names the threshold.
    """

    thresholds: dict[str, float] | None = None
    primary: str | None = None
    dual: DualUpdate = field(default_factory=LogPID)
    window: int = 8
    dual_window: int = 1
    dual_delay: int = 0
    patience: int = 200

    needs: ClassVar[frozenset[Signal]] = frozenset({Signal.ADVANTAGES, Signal.SAMPLES})
    claims: ClassVar[frozenset[Claim]] = CONVEX | {Claim.ONE_OBJECTIVE}

    def __post_init__(self) -> None:
        for name, value, least in (
            ("window", self.window, 1),
            ("patience", self.patience, 1),
            ("dual_delay", self.dual_delay, 0),
        ):
            if value < least:
                raise UserError(f"Lagrangian needs {name} of at least {least}, got {value}")
        if not 1 <= self.dual_window <= self.window:
            raise UserError(f"Lagrangian needs dual_window from 1 to window {self.window}, got {self.dual_window}")

    def init(self, objectives: Sequence[str], weights_N: Tensor) -> State:
        """First multipliers, thresholds by name."""
        state = init_constraints(self, self.primary, self.thresholds, self.dual, objectives)
        # Sums of scores and numbers of responses, per batch.
        return state | {"window": torch.zeros(self.window, 2, len(objectives))}

    def resume(self, saved: State, fresh: State) -> State:
        """All that was learnt of what still is constrained, under the configuration's thresholds."""
        settings = ("primary",) if self.thresholds is None else ("primary", "thresholds")
        saved = rename_old_entries(saved)
        same = {k: saved[k] for k in saved.keys() & fresh.keys() - {*settings} if saved[k].shape == fresh[k].shape}
        bound_N = saved["thresholds"].isfinite() & (fresh["thresholds"].isfinite() | (self.thresholds is None))
        return fresh | same | {"duals": saved["duals"].where(bound_N, fresh["duals"])}

    def observe(self, experience: Experience, state: State) -> State:
        """One step of the multipliers on the values of the window that a collected batch completes."""
        window_W2N, values_N = slide_window(state["window"], experience)
        state = state | {"window": window_W2N, "values": values_N, "batches": state["batches"] + 1}
        state |= update_spreads(state, experience.rewards.trained_BN, experience.valid_BN)
        if self.thresholds is None and state["batches"] <= self.window:
            state["thresholds"] = values_N.where(state["primary"] == 0, torch.nan)
        elif state["batches"] > self.dual_delay:
            recent_N = torch.div(*window_W2N[-self.dual_window :].sum(0))
            state |= self.dual.step_state(state, recent_N - state["thresholds"])
        return self._watch(state, experience.rewards.trained_names)

    def report(self, state: State) -> dict[str, Tensor]:
        """Multipliers, thresholds, and the values that they are compared with."""
        return constraint_curves(state)

    def combine(self, signals: Signals, state: State) -> Combined:
        """The weighted advantage per token."""
        assert signals.advantages_BTN is not None
        shares_N = (state["primary"] + state["duals"]).to(signals.advantages_BTN.device)
        weights_N = shares_N / shares_N.sum()
        return Combined((signals.advantages_BTN.where(signals.present_BTN(), 0.0) * weights_N).sum(-1), weights_N)

    def _watch(self, state: State, names: Sequence[str]) -> State:
        """Warn once of each threshold that stays violated with its multiplier at its largest."""
        if state["batches"] < self.window:
            return state  # a few batches are too noisy to judge by
        message = stuck_message("Lagrangian", state, names, self.dual, self.window, f"{self.patience} batches")
        known_N = torch.ones_like(state["primary"], dtype=torch.bool)
        return state | warn_if_stuck(state, state["values"], known_N, self.dual, self.patience, message)
