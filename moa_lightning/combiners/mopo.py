"""MOPO: the primary objective as high as it goes while the others stay above their thresholds.

Legend: B sequences, N objectives; the primary one among them has multiplier 1.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from moa_lightning.combiners.base import Combined, Combiner
from moa_lightning.combiners.duals import DualUpdate, Lagrangian
from moa_lightning.distributed import all_rows, all_sum
from moa_lightning.functional.mopo import robust_value
from moa_lightning.functional.preference import group_sizes, group_softmax
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
    in no expectation of that objective, and its term is left out of the ratio there.

    Args:
        primary: name of the primary objective; ``None`` is the first.
        thresholds: least mean win probability of each secondary objective by name, in (0, 1); an objective that is
            not named has no constraint and is only watched. ``None`` sets adaptive thresholds.
        beta: adaptive thresholds are ``beta`` times the value of the reference when they are refreshed, every
            ``refresh_interval`` batches; use the same interval in reference ``LaggedCopy``.
        refresh_interval: batches between two refreshes.
        tau: strength of the KL regularisation towards the reference, in units of win probability.
        radius: of the KL ball of the robust value, in nats; 0 is the plain mean.
        dual: how the multipliers move: ``Lagrangian`` or ``LogBarrier``.
        dual_delay: batches before the multipliers move.
        normalize: the responses that share one normalisation: those to a ``prompt``, or of the ``batch``.
        patience: batches that a threshold may stay violated with its multiplier at the cap (or, for ``LogBarrier``,
            at its largest) before a warning names it.
    """

    primary: str | None = None
    thresholds: dict[str, float] | None = None
    beta: float = 0.9995
    refresh_interval: int = 500
    tau: float = 0.08
    radius: float = 0.0
    dual: DualUpdate = field(default_factory=Lagrangian)
    dual_delay: int = 0
    normalize: Literal["prompt", "batch"] = "prompt"
    patience: int = 200

    needs: ClassVar[frozenset[Signal]] = frozenset({Signal.WINS})

    def __post_init__(self) -> None:
        """Refuse values without meaning."""
        if self.tau <= 0 or self.radius < 0 or not 0 < self.beta <= 1:
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
        known = ", ".join(objectives)
        primary = objectives[0] if self.primary is None else self.primary
        if primary not in objectives:
            raise ValueError(f"MOPO.primary '{primary}' is no trained objective; they are {known}")
        for name in self.thresholds or {}:
            if name not in objectives:
                raise ValueError(f"MOPO.thresholds names '{name}', which is no trained objective; they are {known}")
            if name == primary:
                raise ValueError(
                    f"MOPO.thresholds names '{name}', the primary objective, which is maximised; remove it"
                )
        count = len(objectives)
        is_primary_N = torch.tensor([float(name == primary) for name in objectives])
        thresholds = self.thresholds or {}
        fixed_N = torch.tensor([thresholds.get(name, torch.nan) for name in objectives])
        return {
            "primary": is_primary_N,
            "duals": torch.zeros(count),
            "thresholds": fixed_N,  # NaN: none (yet)
            "values": torch.full((count,), torch.nan),  # E_rho of each objective, robust where asked for
            "best": torch.full((count,), -torch.inf),
            "chi": torch.full((count,), torch.inf),
            "batches": torch.zeros(()),
            "stuck": torch.zeros(count),
        }

    def observe(self, experience: Experience, state: State) -> State:
        """One step of the multipliers on a collected batch, in the order of Algorithm 1: chi, then lambda."""
        assert experience.wins_BN is not None and experience.group_B is not None
        state = {name: value.clone() for name, value in state.items()}
        wins_BN = experience.wins_BN.float()
        group_B = self._groups(experience.group_B)
        policy_B = self._policy(wins_BN, group_B, experience.log_prior_B, state)
        values_N, chi_N = self._values(wins_BN, policy_B, group_B, experience)
        state["values"], state["chi"] = values_N, chi_N
        state["best"] = torch.where(values_N > state["best"], values_N, state["best"])
        secondary_N = state["primary"] == 0
        if self.thresholds is None and int(state["batches"]) % self.refresh_interval == 0:
            # Of the reference, not of the optimum: a threshold below what the optimum has already would never bind.
            reached_N, _ = self._values(wins_BN, self._prior(wins_BN, group_B, experience), group_B, experience)
            state["thresholds"] = torch.where(secondary_N & reached_N.isfinite(), self.beta * reached_N, torch.nan)
        slack_N = values_N - state["thresholds"]
        bound_N = secondary_N & slack_N.isfinite()
        if state["batches"] >= self.dual_delay:
            duals_N = self.dual(state["duals"], slack_N.where(bound_N, 0.0))
            self._watch(state, duals_N, slack_N.where(bound_N, 0.0), experience.rewards.trained_names)
            state["duals"] = duals_N.where(bound_N, state["duals"])
        state["batches"] = state["batches"] + 1
        return state

    def combine(self, signals: Signals, state: State) -> Combined:
        """The importance weight of each response, with mean 1 among the responses to a prompt."""
        assert signals.wins_BN is not None and signals.group_B is not None
        group_B = self._groups(signals.group_B)
        policy_B = self._policy(signals.wins_BN.float(), group_B, signals.log_prior_B, state)
        labelled_B = signals.wins_BN.isfinite().any(1) & signals.mask_BT.any(1)
        score_B = (policy_B * group_sizes(group_B)).where(labelled_B, 0.0)
        weights_N = state["primary"] + state["duals"]
        return Combined(score_B, weights_N / weights_N.sum())

    def _groups(self, group_B: Tensor) -> Tensor:
        return group_B if self.normalize == "prompt" else torch.zeros_like(group_B)

    def _policy(self, wins_BN: Tensor, group_B: Tensor, log_prior_B: Tensor | None, state: State) -> Tensor:
        """Probability of each response among those of its group under the constrained optimum."""
        weights_N = (state["primary"] + state["duals"]).to(wins_BN.device)
        logits_B = (wins_BN.where(wins_BN.isfinite(), 0.0) * weights_N).sum(1) / self.tau
        return group_softmax(logits_B if log_prior_B is None else logits_B + log_prior_B, group_B)

    def _prior(self, wins_BN: Tensor, group_B: Tensor, experience: Experience) -> Tensor:
        """Probability of each response among those of its group under the reference."""
        log_prior_B = experience.log_prior_B
        return group_softmax(wins_BN.new_zeros(len(wins_BN)) if log_prior_B is None else log_prior_B, group_B)

    def _values(
        self, wins_BN: Tensor, policy_B: Tensor, group_B: Tensor, experience: Experience
    ) -> tuple[Tensor, Tensor]:
        """Mean of each objective under a policy, over the prompts that have it and over all processes."""
        present_BN = wins_BN.isfinite()
        weighted_BN = (policy_B.unsqueeze(1) * wins_BN).where(present_BN, 0.0)
        # Where a prompt lacks some of an objective's labels, the others stand for them.
        mass_BN = policy_B.unsqueeze(1).expand_as(wins_BN).where(present_BN, 0.0)
        totals_2N = all_sum(torch.stack([weighted_BN.sum(0), mass_BN.sum(0)])).cpu()
        values_N, chi_N = totals_2N[0] / totals_2N[1], torch.full_like(totals_2N[0], torch.inf)
        if self.radius == 0:
            return values_N, chi_N
        prior_B = self._prior(wins_BN, group_B, experience)
        for i in range(wins_BN.shape[1]):
            rows_B = present_BN[:, i]
            # rho q per response, its prompts equally likely: the ball is around the reference over the whole batch.
            rho_q = all_rows((policy_B / prior_B * wins_BN[:, i])[rows_B])
            if len(rho_q):
                values_N[i], chi_N[i] = robust_value(rho_q, self.radius, all_rows(prior_B[rows_B]).log())
        return values_N, chi_N

    def _watch(self, state: State, duals_N: Tensor, slack_N: Tensor, names: Sequence[str]) -> None:
        """Count how long a multiplier at its largest has left its threshold violated; warn once."""
        stalled_N = (slack_N < 0) & (duals_N >= 0.99 * self.dual.largest)
        state["stuck"] = torch.where(stalled_N, state["stuck"] + 1, 0.0)
        for i in (state["stuck"] == self.patience).nonzero().flatten().tolist():
            warnings.warn(
                f"MOPO's threshold {float(state['thresholds'][i]):.3g} for '{names[i]}' cannot be met: its multiplier "
                f"has been at its largest for {self.patience} batches; the best value reached is "
                f"{float(state['best'][i]):.3g}. Lower the threshold"
                + (f", or the radius {self.radius:g}" if self.radius else ""),
                stacklevel=2,
            )
