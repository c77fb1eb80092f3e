"""MOPO: the primary objective as high as it goes while the others stay above their thresholds.

Legend: B sequences, N objectives; the primary one among them has multiplier 1.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from moa_lightning.combiners.base import Combined, Combiner
from moa_lightning.combiners.duals import DualUpdate, Projected
from moa_lightning.combiners.weights import primary_and_thresholds
from moa_lightning.distributed import all_rows, all_sum
from moa_lightning.functional.mopo import robust_value
from moa_lightning.functional.preference import fill_from_group, group_max, group_softmax
from moa_lightning.signals import Signal, Signals
from moa_lightning.types import Experience, State


@dataclass(frozen=True)
class MOPO(Combiner):
    """Maximise the primary objective's win probability subject to a threshold on each secondary one's.

    The score is the importance weight of each response: the ratio of the constrained optimum to the reference,
    ``rho = exp((p + lambda q) / tau) / E_ref exp(...)``, with mean 1. It goes with loss ``WeightedLikelihood``. The
    multipliers ``lambda`` take one step per collected batch; there is one for each objective, for the whole data set.

    Source: Agnihotri et al., "Multi-Objective Preference Optimization", arXiv 2505.10892, Algorithm 1. Deviations: the
    ratio is the normalised one (the paper's Eq. 3 is no density ratio); it is normalised among the responses to each
    prompt unless ``normalize`` says otherwise; the robust value is off unless ``radius`` is set, because the paper's
    0.15 lies far above the slack that its adaptive thresholds leave. A prompt without a label for an objective counts
    in no expectation of that objective, and its term is left out of the ratio there; where some of its responses have
    one, the others count as their mean.

    Args:
        primary: name of the primary objective; ``None`` is the first.
        thresholds: least mean win probability of each secondary objective by name, in (0, 1); an objective that is
            not named has no constraint and is only watched. ``None`` sets adaptive thresholds.
        beta: adaptive thresholds are ``beta`` times the value of the reference, averaged over the batches since it was
            refreshed.
        refresh_interval: collected batches between two refreshes: that of reference ``LaggedCopy``, which counts
            optimiser steps, times ``accumulate_grad_batches``.
        tau: strength of the KL regularisation towards the reference, in units of win probability.
        radius: of the KL ball of the robust value, in nats; 0 is the plain mean.
        dual: how the multipliers move: ``Projected``, ``Optimistic``, ``PID``, ``Exponential`` or ``LogBarrier``.
        dual_delay: batches before the multipliers move.
        normalize: the responses that share one normalisation: those to a ``prompt``, or of the ``batch``.
        patience: batches that values are averaged over to judge a threshold. A warning names one that even the best
            response to each prompt would not meet, and one that has stayed violated for as many batches again with its
            multiplier at its largest.
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

    needs: ClassVar[frozenset[Signal]] = frozenset({Signal.WINS})

    def __post_init__(self) -> None:
        """Refuse values without meaning."""
        if not self.tau > 0 or not 0 <= self.radius < math.inf or not 0 < self.beta <= 1:
            raise ValueError(
                f"MOPO needs tau > 0, radius >= 0 and beta in (0, 1], got {self.tau}, {self.radius} and {self.beta}"
            )
        if self.refresh_interval < 1 or self.patience < 1 or self.dual_delay < 0:
            raise ValueError("MOPO needs refresh_interval and patience of at least 1, and dual_delay of at least 0")
        for name, threshold in (self.thresholds or {}).items():
            if not 0 < threshold < 1:
                raise ValueError(f"MOPO.thresholds.{name} must lie in (0, 1), as a win probability; got {threshold}")

    def init(self, objectives: Sequence[str], weights_N: Tensor) -> State:
        """Multipliers of 0, thresholds by name.

        Raises:
            ValueError: a name is no objective, or the primary objective has a threshold.
        """
        primary_N, thresholds_N = primary_and_thresholds(self, self.primary, self.thresholds, objectives)
        bound_N = primary_N == 0 if self.thresholds is None else thresholds_N.isfinite()
        count = len(objectives)
        return {
            "primary": primary_N,
            "duals": bound_N * self.dual.start,
            **self.dual.init(count),
            "thresholds": thresholds_N,  # NaN: none (yet)
            "values": torch.full((count,), torch.nan),  # E_rho of each objective, robust where asked for
            "chi": torch.full((count,), torch.inf),
            "batches": torch.zeros(()),
            # Means over about the last `patience` batches: a single batch is too noisy to judge a threshold by.
            "mean_values": torch.zeros(count),
            "valued": torch.zeros(count),  # batches in this mean
            "mean_attainable": torch.zeros(count),  # if the best response to each prompt were always chosen
            "seen": torch.zeros(count),  # batches in this one
            "best": torch.full((count,), -torch.inf),  # of the mean values
            "stuck": torch.zeros(count),
            "warned": torch.zeros(count),
            # Of the reference, over the batches since the thresholds were last refreshed.
            "reference_values": torch.zeros(count),
            "reference_seen": torch.zeros(count),
        }

    @property
    def gives_weights(self) -> bool:
        """True."""
        return True

    def resume(self, saved: State, fresh: State) -> State:
        """All that was learnt, under the configuration's primary objective and, if they are fixed, thresholds."""
        settings = ("primary", "thresholds") if self.thresholds is not None else ("primary",)
        # Another dual step than the checkpoint's begins with its own memory.
        return {name: saved.get(name, value) for name, value in fresh.items()} | {n: fresh[n] for n in settings}

    def observe(self, experience: Experience, state: State) -> State:
        """One step of the multipliers on a collected batch, in the order of Algorithm 1: chi, then lambda."""
        assert experience.wins_BN is not None and experience.group_B is not None
        state = {name: value.clone() for name, value in state.items()}
        batch = _Batch(
            experience.wins_BN.float(), experience.group_B, experience.mask_BT.any(1), experience.log_prior_B
        )
        policy_B = self._policy(batch, state)
        values_N, chi_N = self._values(batch, policy_B)
        state["values"], state["chi"] = values_N, chi_N
        secondary_N = state["primary"] == 0
        if self.thresholds is None:
            self._adapt(state, self._values(batch, self._prior(batch))[0], secondary_N)
        slack_N = values_N - state["thresholds"]
        bound_N = secondary_N & slack_N.isfinite()
        if state["batches"] >= self.dual_delay:
            state["duals"], memory = self.dual.update(state["duals"], slack_N.where(bound_N, torch.nan), state)
            state |= memory
        self._watch(state, self._attainable(batch), bound_N, experience.rewards.trained_names)
        state["batches"] = state["batches"] + 1
        return state

    def report(self, state: State) -> dict[str, Tensor]:
        """Multipliers, thresholds, and the values that they are compared with."""
        bound_N = (state["primary"] == 0) & state["thresholds"].isfinite()
        return {
            "duals": state["duals"].where(bound_N, torch.nan),
            "thresholds": state["thresholds"],
            "values": state["values"],
        }

    def combine(self, signals: Signals, state: State) -> Combined:
        """The importance weight of each response: mean 1 over the batch, and each prompt as much as any other."""
        assert signals.wins_BN is not None and signals.group_B is not None
        batch = _Batch(signals.wins_BN.float(), signals.group_B, signals.mask_BT.any(1), signals.log_prior_B)
        policy_B = self._policy(batch, state)
        weights_N = state["primary"] + state["duals"]
        return Combined(policy_B * (len(policy_B) / policy_B.sum().clamp(min=1.0)), weights_N / weights_N.sum())

    def _groups(self, batch: "_Batch") -> Tensor:
        return batch.group_B if self.normalize == "prompt" else torch.zeros_like(batch.group_B)

    def _policy(self, batch: "_Batch", state: State) -> Tensor:
        """Probability of each response among those of its group under the constrained optimum."""
        weights_N = (state["primary"] + state["duals"]).to(batch.wins_BN.device)
        logits_B = (fill_from_group(batch.wins_BN, batch.group_B) * weights_N).sum(1) / self.tau
        return self._softmax(batch, logits_B)

    def _prior(self, batch: "_Batch") -> Tensor:
        """Probability of each response among those of its group under the reference."""
        return self._softmax(batch, torch.zeros_like(batch.wins_BN[:, 0]))

    def _softmax(self, batch: "_Batch", logits_B: Tensor) -> Tensor:
        if batch.log_prior_B is not None:
            logits_B = logits_B + batch.log_prior_B
        return group_softmax(logits_B.masked_fill(~batch.counted_B, -torch.inf), self._groups(batch))

    def _values(self, batch: "_Batch", policy_B: Tensor) -> tuple[Tensor, Tensor]:
        """Mean of each objective under a policy, over the prompts that have it and over all processes."""
        wins_BN, present_BN = batch.wins_BN, batch.wins_BN.isfinite() & batch.counted_B.unsqueeze(1)
        weighted_BN = (policy_B.unsqueeze(1) * wins_BN).where(present_BN, 0.0)
        # Where a prompt lacks some of an objective's labels, the others stand for them.
        mass_BN = policy_B.unsqueeze(1).expand_as(wins_BN).where(present_BN, 0.0)
        totals_2N = all_sum(torch.stack([weighted_BN.sum(0), mass_BN.sum(0)])).cpu()
        values_N, chi_N = totals_2N[0] / totals_2N[1], torch.full_like(totals_2N[0], torch.inf)
        if self.radius == 0:
            return values_N, chi_N
        prior_B = self._prior(batch)
        for i in range(wins_BN.shape[1]):
            rows_B = present_BN[:, i] & (prior_B > 0)
            # rho q per response, its prompts equally likely: the ball is around the reference over the whole batch.
            rho_q = all_rows((policy_B / prior_B * wins_BN[:, i])[rows_B])
            log_prior = all_rows(prior_B[rows_B]).log()  # on every process, whether or not it has rows
            if len(rho_q):
                values_N[i], chi_N[i] = robust_value(rho_q, self.radius, log_prior)
        return values_N, chi_N

    def _attainable(self, batch: "_Batch") -> Tensor:
        """Mean of each objective if the best response to each prompt were always chosen: no policy has more."""
        present_BN = batch.wins_BN.isfinite() & batch.counted_B.unsqueeze(1)
        best_GN = group_max(batch.wins_BN.where(present_BN, -torch.inf), self._groups(batch))
        found_GN = best_GN.isfinite()
        sums_2N = all_sum(torch.stack([best_GN.where(found_GN, 0.0).sum(0), found_GN.float().sum(0)])).cpu()
        return sums_2N[0] / sums_2N[1]

    def _adapt(self, state: State, reference_N: Tensor, secondary_N: Tensor) -> None:
        """Thresholds of ``beta`` times the reference's value, averaged since its last refresh."""
        if int(state["batches"]) % self.refresh_interval == 0:
            state["reference_seen"] = torch.zeros_like(state["reference_seen"])
        state["reference_values"], state["reference_seen"] = _running_mean(
            state["reference_values"], state["reference_seen"], reference_N, self.refresh_interval
        )
        known_N = secondary_N & (state["reference_seen"] > 0)
        state["thresholds"] = torch.where(known_N, self.beta * state["reference_values"], state["thresholds"])

    def _watch(self, state: State, attainable_N: Tensor, bound_N: Tensor, names: Sequence[str]) -> None:
        """Warn once of a threshold that no policy meets, or whose multiplier at its largest leaves it violated."""
        for mean, count, new_N in (
            ("mean_values", "valued", state["values"]),
            ("mean_attainable", "seen", attainable_N),
        ):
            state[mean], state[count] = _running_mean(state[mean], state[count], new_N, self.patience)
        settled_N = bound_N & (state["seen"] >= self.patience)
        state["best"] = state["mean_values"].where(settled_N & (state["mean_values"] > state["best"]), state["best"])
        violated_N = settled_N & (state["mean_values"] < state["thresholds"])
        state["stuck"] = self.dual.stuck(state["duals"], violated_N, state["stuck"])
        impossible_N = settled_N & (state["mean_attainable"] < state["thresholds"])
        named_N = (impossible_N | (state["stuck"] >= self.patience)) & (state["warned"] == 0)
        state["warned"] = state["warned"].masked_fill(named_N, 1.0)
        for i in named_N.nonzero().flatten().tolist():
            why = (
                f"always choosing the best response to each prompt would give {float(state['mean_attainable'][i]):.3g}"
                if impossible_N[i]
                else f"its multiplier has been at its largest for {self.patience} batches"
            )
            rank_zero_warn(
                f"MOPO's threshold {float(state['thresholds'][i]):.3g} for '{names[i]}' cannot be met: {why}; the best "
                f"value reached, as a mean over {self.patience} batches, is {float(state['best'][i]):.3g}. Lower the "
                "threshold" + (f", or the radius {self.radius:g}" if self.radius else "")
            )


@dataclass(frozen=True)
class _Batch:
    """Responses with their labels, and which of them take part."""

    wins_BN: Tensor
    group_B: Tensor
    trained_B: Tensor
    log_prior_B: Tensor | None

    @property
    def counted_B(self) -> Tensor:
        """Responses that are trained on and that somebody judged; the others have no share in any expectation."""
        return self.trained_B & self.wins_BN.isfinite().any(1)


def _running_mean(mean_N: Tensor, seen_N: Tensor, new_N: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Plain mean of the first ``window`` values, exponential after them; NaN is no value."""
    known_N = new_N.isfinite()
    count_N = (seen_N + known_N).clamp(max=window)
    return torch.where(known_N, mean_N + (new_N - mean_N) / count_N.clamp(min=1), mean_N), count_N
