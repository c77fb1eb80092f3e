"""What beta, t0 and tau change: MOPO's adaptive thresholds and its lagged reference on a tabular policy.

The policy is a table of K logits; everything else is the real thing: ``MOPO`` with adaptive thresholds, ``LaggedCopy``
and ``WeightedLikelihood``. The preferences are exact, so nothing here is noise.

Legend: K responses, one token each, N objectives.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bench.mopo.structures import Array, Structure, divergence
from moa_lightning.combiners import MOPO, Projected
from moa_lightning.losses import RewardKL, WeightedLikelihood
from moa_lightning.models import LaggedCopy
from moa_lightning.models.policy import PolicyOutput
from moa_lightning.types import Experience, Responses, RewardTable

BETAS = (0.9, 0.95, 0.99, 0.999)
INTERVALS: tuple[int | None, ...] = (1, 100, 1000, None)
TAUS = (0.04, 0.08, 0.16, 0.32)


@dataclass(frozen=True)
class Setting:
    """One run. The values that are not varied are the paper's, where it names one."""

    beta: float = 0.99
    interval: int | None = 500  # None: the reference and the thresholds are never refreshed
    tau: float = 0.08
    steps: int = 5000
    learning_rate: float = 1.0
    dual_rate: float = 0.5


@dataclass(frozen=True)
class Outcome:
    """Where a run ends."""

    values_N: Array
    kl: float  # from the first policy, in nats
    duals_M: Array
    largest_duals_M: Array
    thresholds_M: Array


class TabularPolicy(nn.Module):
    """K logits, of the shape that references and losses ask of a policy."""

    def __init__(self, prior_K: Array) -> None:
        super().__init__()
        self.logits_K = nn.Parameter(torch.as_tensor(prior_K).log().float())

    def trainable(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """The logits, and no value heads."""
        return [self.logits_K], []

    def forward(self, *inputs: Any, with_values: bool = True) -> PolicyOutput:
        """Log-probabilities of all responses, whatever the inputs."""
        logprobs_K1 = self.logits_K.log_softmax(0).unsqueeze(1)
        return PolicyOutput(logprobs_K1, torch.zeros_like(logprobs_K1), None, torch.zeros(len(logprobs_K1), 1, 1))


def ablate(structure: Structure, prior_K: Array, setting: Setting) -> Outcome:
    """Train a table and say where it ends."""
    wins_KN, interval = structure.wins_KN.float(), setting.interval or setting.steps + 1
    policy: Any = TabularPolicy(prior_K)
    reference, loss, kl = LaggedCopy(interval), WeightedLikelihood(), RewardKL()
    reference.setup(policy)
    combiner = MOPO(beta=setting.beta, refresh_interval=interval, tau=setting.tau, dual=Projected(lr=setting.dual_rate))
    state = combiner.init(list(structure.wins), torch.ones(wins_KN.shape[1]))
    optimizer = torch.optim.SGD(policy.parameters(), lr=setting.learning_rate)
    largest_N = torch.zeros(wins_KN.shape[1])
    empty = _experience(structure, wins_KN)
    inputs = (empty.responses.input_ids_BL, empty.responses.attention_mask_BL, empty.mask_BT, 1.0)
    for step in range(setting.steps):
        reference.advance(policy, step)
        prior_K1 = reference.logprobs(policy, *inputs)
        experience = replace(empty, reference_logprobs_BT=prior_K1, log_prior_B=prior_K1[:, 0])
        state = combiner.observe(experience, state)
        largest_N = torch.maximum(largest_N, state["duals"])
        optimizer.zero_grad()
        loss(combiner.combine(experience, state), experience, policy(), kl).loss.backward()
        optimizer.step()
    policy_K = policy.logits_K.detach().double().softmax(0).numpy()
    return Outcome(
        values_N=policy_K @ structure.wins_KN.numpy(),
        kl=divergence(policy_K, np.asarray(prior_K)),
        duals_M=state["duals"][1:].numpy(),
        largest_duals_M=largest_N[1:].numpy(),
        thresholds_M=state["thresholds"][1:].numpy(),
    )


def _experience(structure: Structure, wins_KN: Tensor) -> Experience:
    count, names = len(wins_KN), tuple(structure.wins)
    ids_K2, mask_K1, texts = torch.zeros(count, 2).long(), torch.ones(count, 1, dtype=torch.bool), [""] * count
    nothing_K1 = torch.zeros(count, 1)
    return Experience(
        responses=Responses(ids_K2, torch.ones_like(ids_K2), mask_K1, ~mask_K1[:, 0], texts, texts, {}),
        rewards=RewardTable(names, (True,) * len(names), wins_KN, wins_KN),
        valid_BN=wins_KN.isfinite(),
        mask_BT=mask_K1,
        behaviour_logprobs_BT=nothing_K1,
        reference_logprobs_BT=nothing_K1,
        advantages_BTN=(wins_KN - 0.5).unsqueeze(1),
        returns_BTN=None,
        values_BTN=None,
        tokens_per_row=1.0,
        group_B=torch.zeros(count, dtype=torch.long),
        wins_BN=wins_KN,
    )
