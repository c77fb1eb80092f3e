"""MOPO: the primary objective as high as it goes while the others stay above their thresholds.

The combiner comes first; then :class:`Comparisons`, the expectations over the responses to each prompt, the adaptive
thresholds, what an evaluation corrects, and the warnings.

Legend: B sequences, N objectives; the primary one among them has multiplier 1. G prompts.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import override

from moa_lightning.combiners.base import Combined, Combiner
from moa_lightning.combiners.claims import CONVEX, Claim
from moa_lightning.combiners.duals import DualUpdate, Projected
from moa_lightning.combiners.shared.constraints import (
    constraint_curves,
    init_constraints,
    rename_old_entries,
    running_mean,
    update_spreads,
    warn_if_stuck,
)
from moa_lightning.distributed import all_rows, all_sum
from moa_lightning.errors import UserError
from moa_lightning.functional.mopo import mopo_policy, robust_value
from moa_lightning.functional.preference import fill_from_group, group_max, group_softmax, group_sum
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
    Missing score: takes the mean of the prompt's other responses in ``rho``; the prompt is left out of that
    objective's values.
    Watch: ``values/<name>`` against ``thresholds/<name>``; ``believed/<name>`` far above ``held_out/<name>`` means that
    the labels do not carry over to other prompts; ``ess`` near one over the responses to a prompt means that ``tau`` is
    small, and that each prompt trains on one of them.

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
        if not self.tau > 0 or not 0 <= self.radius < math.inf or not 0 < self.beta <= 1:
            got = f"{self.tau}, {self.radius} and {self.beta}"
            raise UserError(f"MOPO needs tau > 0, radius >= 0 and beta in (0, 1], got {got}")
        if self.refresh_interval < 1 or self.patience < 1 or self.dual_delay < 0:
            raise UserError("MOPO needs refresh_interval and patience of at least 1, and dual_delay of at least 0")
        require_probabilities(self.thresholds or {})

    def init(self, objectives: Sequence[str], weights_N: Tensor) -> State:
        """First multipliers, thresholds by name."""
        state = init_constraints(self, self.primary, self.thresholds, self.dual, objectives)
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
    @override
    def gives_weights(self) -> bool:
        return True

    def resume(self, saved: State, fresh: State) -> State:
        """All that was learnt, under the configuration's primary objective and, if they are fixed, thresholds."""
        settings = ("primary", "thresholds") if self.thresholds is not None else ("primary",)
        saved = rename_old_entries(saved)
        # Another dual step than the checkpoint's begins with its own memory.
        return {name: saved.get(name, value) for name, value in fresh.items()} | {n: fresh[n] for n in settings}

    def observe(self, experience: Experience, state: State) -> State:
        """One step of the multipliers on a collected batch, in the order of Algorithm 1: chi, then lambda."""
        batch, names = Comparisons.of(experience, self.normalize), experience.rewards.trained_names
        if state["batches"] == 0 and experience.log_policy_B is not None and experience.moving_BN is None:
            warn_of_votes(batch, names)
        policy_B = batch.policy(state["primary"] + state["duals"], self.tau)
        believed_N, believed_chi_N = batch.values(policy_B, self.radius)
        values_N, chi_N, own_N = believed_N, believed_chi_N, has_own_values(experience)
        own = batch
        if experience.log_policy_B is not None and self.dual_values == "policy":
            # The policy learnt its weights from other prompts, so this batch's labels are independent of them.
            own = Comparisons.of_policy(experience)
            values_N, chi_N = own.values(own.choice(experience.log_policy_B), self.radius)
            values_N, chi_N = values_N.where(own_N, believed_N), chi_N.where(own_N, believed_chi_N)
        # The correction is that of the plain mean: what a radius takes off stays off.
        plain_N = batch.values(policy_B, 0.0)[0] if self.radius else believed_N
        moving_N = values_N
        if experience.log_policy_B is not None and self.dual_values == "held_out":
            moving_N = believed_N + state["gap"]
            values_N = (state["held_out"] + believed_N - plain_N).where(own_N, believed_N)
        state = state | {"values": values_N, "chi": chi_N, "believed": believed_N, "labelled": batch.labelled()}
        state |= average_believed(state, plain_N) | update_spreads(state, own.wins_BN, own.complete_BN)
        state["evaluates_wins"] = own_N.float()
        return self._step(batch, moving_N, state, names)

    def _step(self, batch: "Comparisons", moving_N: Tensor, state: State, names: Sequence[str]) -> State:
        """Adapt the thresholds, move the multipliers by these values, and warn where a threshold cannot be met."""
        if self.thresholds is None:
            reference_N, _ = batch.values(batch.prior(), self.radius)
            state |= adapt_thresholds(state, reference_N, self.beta, self.refresh_interval)
        slack_N = (moving_N - state["thresholds"]).where(state["primary"] == 0, torch.nan)
        if state["batches"] >= self.dual_delay:
            state |= self.dual.step_state(state, slack_N)
        bound_N = slack_N.isfinite() & state["values"].isfinite()
        state |= update_feasibility(state, batch.attainable(), bound_N, self.dual, self.patience, self.radius, names)
        warn_of_unlabelled(state, self.patience, names)
        return state | {"batches": state["batches"] + 1}

    def observe_evaluation(self, values_N: Tensor, state: State) -> State:
        """The values on held-out prompts, where these are win probabilities, and how far the believed ones lie off."""
        return state | measure_gap(state, values_N.float().where(state["evaluates_wins"] > 0, torch.nan))

    def report(self, state: State) -> dict[str, Tensor]:
        """Multipliers, thresholds, the values that they are compared with, and what else is known of these."""
        return constraint_curves(state) | {name: state[name] for name in ("believed", "held_out", "labelled")}

    def combine(self, signals: Signals, state: State) -> Combined:
        """The importance weight of each response: mean 1 over the batch, and each prompt as much as any other."""
        weights_N = state["primary"] + state["duals"]
        policy_B = Comparisons.of(signals, self.normalize).policy(weights_N, self.tau)
        count, total = all_sum(torch.stack([torch.ones_like(policy_B).sum(), policy_B.sum()]))
        return Combined(policy_B * (count / total.clamp(min=1.0)), weights_N / weights_N.sum())


@dataclass(frozen=True)
class Comparisons:
    """Responses with their win probabilities, and which of them take part."""

    wins_BN: Tensor  # NaN: unknown
    group_B: Tensor  # which prompt a row belongs to
    pool_B: Tensor  # the rows that share one normalisation: a prompt's, or all
    trained_B: Tensor
    log_prior_B: Tensor | None

    @classmethod
    def of(cls, rows: Signals, normalize: Literal["prompt", "batch"]) -> "Comparisons":
        """The responses of a collected batch, or of a minibatch of it."""
        assert rows.wins_BN is not None and rows.group_B is not None
        pool_B = rows.group_B if normalize == "prompt" else torch.zeros_like(rows.group_B)
        return cls(rows.wins_BN.float(), rows.group_B, pool_B, rows.mask_BT.any(1), rows.log_prior_B)

    @classmethod
    def of_policy(cls, experience: Experience) -> "Comparisons":
        """The responses that say how good the policy itself is.

        On rollouts these are all that have a win probability, as in evaluations: also cut-off ones that the update
        leaves out. Without those the policy would look better than it is, as long as they are worse.
        """
        found = cls.of(experience, "prompt")
        if experience.moving_BN is None:
            return found
        return replace(found, trained_B=torch.ones_like(found.trained_B))

    @property
    def counted_B(self) -> Tensor:
        """Responses that are trained on and that somebody judged; the others have no share in any expectation."""
        return self.trained_B & self.wins_BN.isfinite().any(1)

    @property
    def complete_BN(self) -> Tensor:
        """Judgements of prompts all of whose responses have one; the others are in no expectation of the objective.

        A prompt that lacks some would be counted as if the policy were trained on all of them, which it is not.
        """
        labelled_BN = self.wins_BN.isfinite()
        lacking_BN = ~labelled_BN & (self.trained_B | ~labelled_BN.any(1)).unsqueeze(1)
        lacking_GN = group_sum(lacking_BN.float(), self.group_B) > 0
        return labelled_BN & self.counted_B.unsqueeze(1) & ~lacking_GN[self.group_B]

    def policy(self, weights_N: Tensor, tau: float) -> Tensor:
        """Probability of each response among those of its pool under the constrained optimum."""
        filled_BN = fill_from_group(self.wins_BN, self.group_B)
        return mopo_policy(filled_BN, weights_N.to(filled_BN.device), tau, self._log_weights(), self.pool_B)

    def prior(self) -> Tensor:
        """Probability of each response among those of its pool under the reference."""
        return group_softmax(self._log_weights(), self.pool_B)

    def choice(self, log_weights_B: Tensor) -> Tensor:
        """Probability of each response among those to its prompt, from its log-weight."""
        return group_softmax(log_weights_B.masked_fill(~self.counted_B, -torch.inf), self.group_B)

    def labelled(self) -> Tensor:
        """Share of the prompts that count in each objective's values, over all processes."""
        counts_GN = group_max(torch.cat([self.complete_BN, self.trained_B.unsqueeze(1)], 1).float(), self.group_B)
        counts_N = all_sum((counts_GN > 0).float().sum(0)).cpu()
        return counts_N[:-1] / counts_N[-1]

    def votes(self) -> tuple[Tensor, float]:
        """Bool ``(N,)``: whether all labels are means of single votes (a win, a loss or a draw against each rival).

        Also the mean number of responses to a prompt. Both are over all processes.
        """
        labelled_BN = self.wins_BN.isfinite()
        rivals_B1 = (torch.bincount(self.group_B)[self.group_B] - 1).unsqueeze(1)
        halves_BN = (self.wins_BN * 2 * rivals_B1).where(labelled_BN, 0.0)
        graded_BN = (halves_BN - halves_BN.round()).abs() > 1e-3
        decided_BN = labelled_BN & ((self.wins_BN - 0.5).abs() > 1e-3)
        sizes = torch.tensor([float(len(self.group_B)), float(len(self.group_B.unique()))]).to(self.wins_BN)
        counts = all_sum(torch.cat([graded_BN.sum(0).to(sizes), decided_BN.sum(0).to(sizes), sizes])).cpu()
        graded_N, decided_N, sizes = counts.split([self.wins_BN.shape[1], self.wins_BN.shape[1], 2])
        return (graded_N == 0) & (decided_N > 0), float(sizes[0] / sizes[1].clamp(min=1))

    def values(self, policy_B: Tensor, radius: float) -> tuple[Tensor, Tensor]:
        """Mean of each objective under a policy, over the prompts that have it and over all processes; its ``chi``."""
        present_BN, policy_B1 = self.complete_BN, policy_B.unsqueeze(1)
        weighted_BN = (policy_B1 * self.wins_BN).where(present_BN, 0.0)
        mass_BN = policy_B1.expand_as(self.wins_BN).where(present_BN, 0.0)
        totals_2N = all_sum(torch.stack([weighted_BN.sum(0), mass_BN.sum(0)])).cpu()
        values_N, chi_N = totals_2N[0] / totals_2N[1], torch.full_like(totals_2N[0], torch.inf)
        if radius == 0:
            return values_N, chi_N
        prior_B = self.prior()
        for i in range(self.wins_BN.shape[1]):
            rows_B = present_BN[:, i] & (prior_B > 0)
            # rho q per response, its prompts equally likely: the ball is around the reference over the whole batch.
            rho_q = all_rows((policy_B / prior_B * self.wins_BN[:, i])[rows_B])
            log_prior = all_rows(prior_B[rows_B]).log()  # on every process, whether or not it has rows
            if len(rho_q):
                values_N[i], chi_N[i] = robust_value(rho_q, radius, log_prior)
        return values_N, chi_N

    def attainable(self) -> Tensor:
        """Mean of each objective if the best response to each prompt, by these very labels, were always chosen.

        No policy has more. On votes none comes near: a vote that is an accident counts here as a preference.
        """
        best_GN = group_max(self.wins_BN.where(self.complete_BN, -torch.inf), self.pool_B)
        found_GN = best_GN.isfinite()
        sums_2N = all_sum(torch.stack([best_GN.where(found_GN, 0.0).sum(0), found_GN.float().sum(0)])).cpu()
        return sums_2N[0] / sums_2N[1]

    def _log_weights(self) -> Tensor:
        """Under the reference; -inf is what takes no part."""
        log_prior_B = torch.zeros_like(self.wins_BN[:, 0]) if self.log_prior_B is None else self.log_prior_B
        return log_prior_B.masked_fill(~self.counted_B, -torch.inf)


def has_own_values(experience: Experience) -> Tensor:
    """Bool ``(N,)``: whether the mean win probability of the policy itself says how good it is.

    Against its own other responses it would be .5 whatever they are worth. The same on all processes.
    """
    if experience.log_policy_B is None:
        return torch.zeros(len(experience.rewards.trained_names), dtype=torch.bool)
    if experience.moving_BN is None:
        return torch.ones(len(experience.rewards.trained_names), dtype=torch.bool)
    return ~experience.moving_BN.cpu().any(0)


def require_probabilities(thresholds: Mapping[str, float]) -> None:
    """Refuse thresholds that are no win probabilities."""
    for name, threshold in thresholds.items():
        if not 0 < threshold < 1:
            raise UserError(f"MOPO.thresholds.{name} must lie in (0, 1), as a win probability; got {threshold}")


FEW_RESPONSES = 8
"""With fewer responses to a prompt than this, single votes leave the weights far from those of the true preferences."""


def warn_of_votes(batch: Comparisons, names: Sequence[str]) -> None:
    """Warn if labels are single votes among few responses: what that costs, and what to judge thresholds by."""
    votes_N, responses = batch.votes()
    named = [name for name, votes in zip(names, votes_N.tolist(), strict=True) if votes]
    if named and responses < FEW_RESPONSES:
        from lightning.pytorch.utilities import rank_zero_warn

        rank_zero_warn(
            f"MOPO's labels of {', '.join(map(repr, named))} are single votes among {responses:.2g} responses to a "
            "prompt. The weights follow each vote, so the policy stays farther from the constrained optimum, and the "
            "curve 'believed' is too high: judge thresholds by held-out values alone. Labels that are probabilities "
            "(moa label), or more responses to a prompt, help"
        )


def warn_of_unlabelled(state: State, patience: int, names: Sequence[str]) -> None:
    """Warn, once patience is at its end, of thresholds that no batch had a value for.

    Args:
        state: the combiner's, this batch counted in ``seen`` and not yet in ``batches``.
        patience: batches until the warning.
        names: of the objectives.
    """
    if int(state["batches"]) + 1 != patience:
        return
    for i in ((state["primary"] == 0) & state["thresholds"].isfinite() & (state["seen"] == 0)).nonzero().flatten():
        from lightning.pytorch.utilities import rank_zero_warn

        rank_zero_warn(
            f"MOPO's threshold {float(state['thresholds'][i]):.3g} for '{names[i]}' has not moved its multiplier: in "
            f"{patience} batches no prompt had this label for all of its responses. Label whole prompts (moa label "
            "fills in what is missing)"
        )


def threshold_memory(count: int) -> State:
    """First memory of the functions below, for so many objectives."""
    return {
        # Means over about the last `patience` batches: a single batch is too noisy to judge a threshold by.
        "mean_values": torch.zeros(count),
        "valued": torch.zeros(count),  # batches in this mean
        "mean_attainable": torch.zeros(count),  # if the best response to each prompt were always chosen
        "seen": torch.zeros(count),  # batches in this one
        # Of the reference, over the batches since the thresholds were last refreshed.
        "reference_values": torch.zeros(count),
        "reference_seen": torch.zeros(count),
    }


def evaluation_memory(count: int) -> State:
    """First memory of :func:`average_believed` and :func:`measure_gap`, for so many objectives."""
    return {
        "held_out": torch.full((count,), torch.nan),  # values at the last evaluation
        "gap": torch.zeros(count),  # these less what was believed in the batches before
        "mean_believed": torch.zeros(count),
        "believed_seen": torch.zeros(count),  # batches in this mean
    }


def average_believed(state: State, believed_N: Tensor) -> State:
    """Mean of the believed values over the batches since the last evaluation, this one included."""
    mean_N, seen_N = running_mean(state["mean_believed"], state["believed_seen"], believed_N, 2**24)
    return {"mean_believed": mean_N, "believed_seen": seen_N}


def measure_gap(state: State, held_out_N: Tensor) -> State:
    """What an evaluation teaches: how far the believed values lie from those on held-out prompts.

    Args:
        state: the combiner's.
        held_out_N: the policy's values on the held-out prompts; NaN where unknown.
    """
    known_N = held_out_N.isfinite() & (state["believed_seen"] > 0)
    gap_N = (held_out_N - state["mean_believed"]).where(known_N, state["gap"])
    zero_N = torch.zeros_like(gap_N)
    return {"held_out": held_out_N, "gap": gap_N, "mean_believed": zero_N, "believed_seen": zero_N.clone()}


def adapt_thresholds(state: State, reference_N: Tensor, beta: float, refresh_interval: int) -> State:
    """Thresholds of ``beta`` times the reference's value, averaged since its last refresh, and what that takes.

    Args:
        state: the combiner's, ``batches`` and ``primary`` included.
        reference_N: the reference's values on this batch; NaN where unknown.
        beta: share of the reference's value.
        refresh_interval: batches between two refreshes of the reference.
    """
    refreshed = int(state["batches"]) % refresh_interval == 0
    seen_N = torch.zeros_like(state["reference_seen"]) if refreshed else state["reference_seen"]
    values_N, seen_N = running_mean(state["reference_values"], seen_N, reference_N, refresh_interval)
    known_N = (state["primary"] == 0) & (seen_N > 0)
    return {
        "reference_values": values_N,
        "reference_seen": seen_N,
        "thresholds": torch.where(known_N, beta * values_N, state["thresholds"]),
    }


def update_feasibility(
    state: State,
    attainable_N: Tensor,
    bound_N: Tensor,
    dual: DualUpdate,
    patience: int,
    radius: float,
    names: Sequence[str],
) -> State:
    """Update the running means of the values, and warn once of a threshold that is infeasible or stays violated.

    Args:
        state: the combiner's, with this batch's ``values``.
        attainable_N: mean of each objective if the best response to each prompt, by these labels, were always chosen:
            no less than what any policy has.
        bound_N: bool, objectives with a threshold and a value.
        dual: how the multipliers move.
        patience: batches in the means, and violated ones until the warning.
        radius: of the robust value.
        names: of the objectives.
    """
    values_N, valued_N = running_mean(state["mean_values"], state["valued"], state["values"], patience)
    attainable_N, seen_N = running_mean(state["mean_attainable"], state["seen"], attainable_N, patience)
    settled_N = bound_N & (seen_N >= patience)
    impossible_N = settled_N & (attainable_N < state["thresholds"])

    def message(i: int, best: float) -> str:
        why = (
            f"always choosing the best response to each prompt, by these very labels, would give only "
            f"{float(attainable_N[i]):.3g}"
            if impossible_N[i]
            else f"its multiplier has been at its largest for {patience} batches"
        )
        return (
            f"MOPO's threshold {float(state['thresholds'][i]):.3g} for '{names[i]}' cannot be met: {why}; the best "
            f"value reached, as a mean over {patience} batches, is {best:.3g}. Lower the threshold"
            + (f", or the radius {radius:g}" if radius else "")
        )

    return {
        "mean_values": values_N,
        "valued": valued_N,
        "mean_attainable": attainable_N,
        "seen": seen_N,
        **warn_if_stuck(state, values_N, settled_N, dual, patience, message, impossible_N),
    }
