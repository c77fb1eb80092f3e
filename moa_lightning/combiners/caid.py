"""CAID: multipliers that are solved for on responses of the reference, before the policy moves.

Legend: B sequences, R kept responses of C columns, N objectives; the primary one has multiplier 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

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
from moa_lightning.combiners.shared.responses import ScoredResponses
from moa_lightning.combiners.shared.scores import ResponseCombiner
from moa_lightning.distributed import all_rows, rank
from moa_lightning.errors import UserError
from moa_lightning.functional.caid import ReferenceDual, ReferenceSamples, reference_dual
from moa_lightning.signals import Signal
from moa_lightning.types import Experience, State


@dataclass(frozen=True)
class CAID(ResponseCombiner):
    """Maximise the primary objective, subject to a least mean value of each of the others; the multipliers come first.

    The best policy for given multipliers has a closed form, so the dual is a function of the reference alone. It is
    minimised on the responses of the first batches, in which the policy stands still; trained is then ``s_1 + sum_j
    lambda_j s_j`` less the KL penalty, whose coefficient is the dual's ``beta``. Dual steps follow, which correct what
    a few responses, or a policy short of the best, leave wrong.

    Choose it when: as ``Lagrangian``, but with multipliers that are known before the first update. Cost: some batches
    without training, a small convex problem; no extra backward pass. Convergence: the papers prove a smooth convex dual
    and, with ``interval``, an optimum up to what the policy can express. Source: Huang et al., "One-Shot Safety
    Alignment for Large Language Models via Optimal Dualization", NeurIPS 2024, arXiv 2405.19544; with ``interval``
    Zhang et al., "Alignment of large language models with constrained learning" (CAID), NeurIPS 2025, arXiv 2505.19387.
    Deviations: Newton steps on the dual; responses are pooled over prompts (``pool_prompts``); a multiplier that they
    do not support starts no larger than what gives its objective the primary one's spread; a coefficient that adapts
    (``RewardKL.target``) has the dual solved anew while no steps follow; a dual step follows each batch instead of
    training to the best policy; the penalty of cut-off responses is taken off each objective, in the dual as well.

    Formula: ``lambda = argmin beta log E_ref exp((s_1 + lambda . (s - b)) / beta)`` over ``lambda >= 0``; then ``A`` is
    ``s_1 + sum_j lambda_j s_j`` less the KL penalty, less its baseline, in standard deviations.
    Symbols: ``lambda`` is ``duals/<name>`` in the logs; ``b`` is ``thresholds``; ``beta`` is ``kl_coefficient``; ``s``
    is a response's scores; the index 1 is ``primary``.
    Missing score: takes the mean of the prompt's other responses; is left out of prompts without any. The pooled dual
    counts only responses with all scores (``scored/<name>`` is their share).
    Watch: ``duals/<name>`` after ``reference_batches``: at its largest at once, the threshold is far from what the
    reference does. ``kl`` that keeps rising: the policy leaves the region that the dual was solved for.

    Args:
        thresholds: least mean value by name, in the objective's own units (after its transform, without penalties and
            KL); objectives not named are only watched. ``None`` asks of each what the reference has.
        primary: name of the objective to maximise; ``None`` is the first.
        reference_batches: batches to solve on; the policy moves from the last of them on.
        pool_prompts: take what responses add to the level of their prompt as samples of one distribution, the same for
            all prompts. Within a prompt alone, as the papers have it (``false``), a few responses hardly ever hold the
            one that the best policy would choose: the multipliers come out far too large, and thresholds unreachable.
        interval: batches from one dual step to the next; ``None`` leaves the multipliers as they are solved (one-shot).
        window: batches that reported values and the warning average over, each response alike.
        dual_window: last batches of the window that a dual step follows; each older one delays it.
        dual: how the multipliers move, and the largest that one may be. There a multiplier of 1 gives an objective the
            primary one's spread between the responses to a prompt. The solved multiplier is the one that holds the
            optimum; ``LogPID`` is above it by a factor of ``exp(kp v)`` while the policy is still ``v`` spreads below
            the threshold, from the first step on, and comes back to it as the violation vanishes.
        patience: dual steps violated, with the multiplier at its largest, until a warning names the threshold.
    """

    thresholds: dict[str, float] | None = None
    primary: str | None = None
    reference_batches: int = 4
    pool_prompts: bool = True
    interval: int | None = 1
    window: int = 8
    dual_window: int = 1
    dual: DualUpdate = field(default_factory=LogPID)
    patience: int = 200

    # Without a KL penalty the best policy has no closed form.
    needs: ClassVar[frozenset[Signal]] = frozenset({Signal.SCORES, Signal.GROUPS, Signal.SAMPLES, Signal.KL_PENALTY})
    claims: ClassVar[frozenset[Claim]] = CONVEX | {Claim.ONE_OBJECTIVE}

    def __post_init__(self) -> None:
        for name in ("reference_batches", "interval", "window", "patience"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"CAID needs {name} of at least 1, got {getattr(self, name)}")
        if not 1 <= self.dual_window <= self.window:
            raise UserError(f"CAID needs dual_window from 1 to window {self.window}, got {self.dual_window}")

    def init(self, objectives: Sequence[str], weights_N: Tensor) -> State:
        """No multipliers yet, thresholds by name."""
        state = init_constraints(self, self.primary, self.thresholds, self.dual, objectives)
        return super().init(objectives, weights_N) | {
            **state,
            "duals": torch.zeros_like(state["duals"]),
            "weights": state["primary"].clone(),
            "window": torch.zeros(self.window, 2, len(objectives)),
            "samples": torch.zeros(0, len(objectives) + 3),
            "units": torch.ones(len(objectives)),  # multipliers that give an objective the primary one's spread
            "scored": torch.ones(len(objectives)),  # share of the responses that the dual could count
            "beta": torch.tensor(torch.nan),  # that the dual was solved for; NaN: not yet
        }

    def resume(self, saved: State, fresh: State) -> State:
        """All that was learnt; under another primary objective or other thresholds the dual is solved anew."""
        saved = rename_old_entries(saved)
        same = saved if saved["window"].shape == fresh["window"].shape else saved | {"window": fresh["window"]}
        state = {name: same.get(name, value) for name, value in fresh.items()} | {"primary": fresh["primary"]}
        asked = ("primary",) if self.thresholds is None else ("primary", "thresholds")
        kept = all(torch.equal(saved[name].nan_to_num(torch.inf), fresh[name].nan_to_num(torch.inf)) for name in asked)
        anew = ("thresholds", "beta", "warned", *self.dual.init(1))
        return state if kept else state | {name: fresh[name] for name in anew}

    def observe(self, experience: Experience, state: State) -> State:
        """Keep responses of the reference, solve the dual on them, then step where asked for."""
        window_W2N, values_N = slide_window(state["window"], experience)
        state = state | {"window": window_W2N, "values": values_N, "batches": state["batches"] + 1}
        state |= update_spreads(state, experience.rewards.trained_BN, experience.valid_BN)
        since, names = int(state["batches"]) - self.reference_batches, experience.rewards.trained_names
        if since <= 0 or len(state["samples"]) == 0:
            state["samples"] = keep_responses(state["samples"], experience)
        assert experience.kl_coefficient is not None  # it needs KL_PENALTY
        ready, beta = since >= 0 and len(state["samples"]) > 0, torch.tensor(experience.kl_coefficient)
        if ready and (state["beta"].isnan() or (self.interval is None and beta != state["beta"])):
            state |= solve_dual(state, beta, self.thresholds is not None, self.pool_prompts, self.dual, names)
        elif ready and self.interval is not None and since % self.interval == 0:
            recent_N = torch.div(*window_W2N[-self.dual_window :].sum(0))
            state = step_duals(state, recent_N, self.dual, self.window, self.patience, names)
        state["weights"] = (state["primary"] + state["duals"]) / (1 + state["duals"].sum())
        state = super().observe(experience, state)
        return state if ready else state | {"spread": torch.full_like(beta, torch.inf)}  # stand still

    def report(self, state: State) -> dict[str, Tensor]:
        """Multipliers, thresholds, and the values that they are compared with."""
        return constraint_curves(state) | {"scored": state["scored"].where(state["thresholds"].isfinite(), torch.nan)}

    def scalarize(self, responses: ScoredResponses, weights_N: Tensor, state: State) -> tuple[Tensor, Tensor]:
        """The primary objective's score and the others' by their multipliers, the penalty taken off each."""
        filled_BN, present_BN = responses.unpenalised().filled()
        shares_BN = present_BN * (state["primary"] + state["duals"]).to(filled_BN)
        penalty_B = 0.0 if responses.penalty_B is None else responses.penalty_B
        total_B1 = shares_BN.sum(1, keepdim=True)
        score_B = (filled_BN * shares_BN).sum(1) - penalty_B * total_B1.squeeze(1)
        return score_B, shares_BN / total_B1.where(total_B1 > 0, 1.0)


def keep_responses(samples_RC: Tensor, experience: Experience) -> Tensor:
    """The kept responses and those of a collected batch, over all processes.

    Columns: each objective's score without penalties (NaN: none), penalty, log-weight under the reference, prompt.
    """
    scores_BN = experience.rewards.trained_BN.where(experience.valid_BN, torch.nan)
    zeros_B = torch.zeros_like(scores_BN[:, 0])
    penalty_B = zeros_B if experience.penalty_B is None else experience.penalty_B
    log_prior_B = zeros_B if experience.log_prior_B is None else experience.log_prior_B
    assert experience.group_B is not None
    place_B = (zeros_B + rank(), experience.group_B.to(zeros_B))  # prompts are counted on each process by itself
    columns_BC = torch.cat([scores_BN, torch.stack([penalty_B.to(zeros_B), log_prior_B, *place_B], 1)], 1)
    new_RC = all_rows(columns_BC[experience.mask_BT.any(1) & experience.valid_BN.any(1)]).cpu()
    if len(new_RC) == 0:
        return samples_RC
    prompts_R = new_RC[:, -2:].unique(dim=0, return_inverse=True)[1]
    if len(samples_RC):
        prompts_R = prompts_R + samples_RC[:, -1].max() + 1
    return torch.cat([samples_RC, torch.cat([new_RC[:, :-2], prompts_R.to(new_RC).unsqueeze(1)], 1)])


def solve_dual(
    state: State, beta: Tensor, fixed: bool, pool_prompts: bool, dual: DualUpdate, names: Sequence[str]
) -> State:
    """Multipliers for the kept responses, and what else is known then; warns of what these cannot tell.

    A multiplier that they do not support is at most the one that gives its objective the primary one's spread: large
    enough to move the policy, and too small to make all else irrelevant.

    Args:
        state: the combiner's, with its ``samples``.
        beta: strength of the KL penalty.
        fixed: whether the thresholds are given; else they are what the reference has.
        pool_prompts: as in :func:`reference_dual`.
        dual: has the largest multiplier, in spreads.
        names: of the objectives.
    """
    samples, thresholds_N = ReferenceSamples.of(state["samples"]), state["thresholds"]
    if not fixed:
        means_N = samples.without_penalties().means(samples.present_RN).float()
        thresholds_N = means_N.where(state["primary"] == 0, torch.nan)
    deviations_N = samples.deviations().float()
    units_N = (deviations_N @ state["primary"]) / deviations_N
    units_N = units_N.where(units_N.isfinite() & (units_N > 0), 1.0)
    found = reference_dual(samples, state["primary"], thresholds_N, float(beta), fixed, pool_prompts)
    asked_N = units_N * thresholds_N.isfinite() if found is None else found.duals_N
    largest_N = units_N * (dual.largest if found is not None and found.feasible else min(1.0, dual.largest))
    first_N = asked_N.minimum(largest_N)
    beyond_N = (asked_N > largest_N) | (thresholds_N.isfinite() & (found is None))
    for i in (beyond_N & (state["warned"] == 0)).nonzero().flatten().tolist():
        from lightning.pytorch.utilities import rank_zero_warn

        why = _doubt(found, i, float(largest_N[i]))
        starts = f"Its multiplier starts at {float(first_N[i]):.3g}"
        rank_zero_warn(f"CAID's threshold {float(thresholds_N[i]):.3g} for '{names[i]}' {why}. {starts}")
    return {
        "thresholds": thresholds_N,
        "duals": first_N,
        "units": units_N,
        "beta": beta,
        "scored": (samples.scored_RN if pool_prompts else samples.complete()).float().mean(0),
        "warned": state["warned"].masked_fill(beyond_N, 1.0),
    }


def _doubt(found: ReferenceDual | None, i: int, largest: float) -> str:
    """Why the kept responses cannot tell an objective's multiplier, and what helps."""
    if found is None:
        return "has no responses with all the scores that it takes"
    if found.feasible:
        return (
            f"takes a multiplier of {float(found.duals_N[i]):.3g}, and its dual step's largest is {largest:.3g}; let "
            "that grow larger, or lower the threshold"
        )
    return (
        "cannot be met, with the others, on the responses of the reference: always choosing the best one would give "
        f"{float(found.attainable_N[i]):.3g}; lower it, or raise source.num_generations or reference_batches"
    )


def step_duals(
    state: State, recent_N: Tensor, dual: DualUpdate, window: int, patience: int, names: Sequence[str]
) -> State:
    """State after one dual step, which is taken in spreads; warns of thresholds that stay violated.

    Args:
        state: the combiner's.
        recent_N: values that the step follows.
        dual: how the multipliers move.
        window: batches in the state's ``values``.
        patience: dual steps violated, with the multiplier at its largest, until the warning.
        names: of the objectives.
    """
    scaled = state | {"duals": state["duals"] / state["units"]}
    scaled |= dual.step_state(scaled, recent_N - state["thresholds"])
    message = stuck_message("CAID", scaled, names, dual, window, f"{patience} dual steps")
    scaled |= warn_if_stuck(scaled, state["values"], state["values"].isfinite(), dual, patience, message)
    return scaled | {"duals": scaled["duals"] * state["units"]}
