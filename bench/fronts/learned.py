"""One policy trained by one combiner with the package's own losses, on samples of itself.

Legend: B samples, G samples of one group, P parameters, N = 2 objectives.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from bench.combiners.roster import Entry
from bench.fronts.problems import Array, Problem
from moa_lightning.losses import PairwiseLogistic, RewardKL
from moa_lightning.models.policy import PolicyOutput
from moa_lightning.signals import ClipRange, Signal, Signals
from moa_lightning.sources import GroupRelative
from moa_lightning.types import Experience, Responses, RewardTable

NAMES = ("first", "second")


@dataclass(frozen=True)
class Recipe:
    """How a policy is trained: Adam, whose learning rate falls linearly to a hundredth."""

    steps: int = 600
    samples: int = 256
    group: int = 16  # samples that count as the responses to one prompt
    evaluate_every: int = 50  # steps, for combiners that follow the front


@dataclass(frozen=True)
class Run:
    """Where a policy ended."""

    values_2: Array  # expected rewards, exact
    distance: float  # from the front
    from_optimum: float | None  # distance from the constrained optimum; None without thresholds


def prepared(entry: Entry, problem: Problem) -> Entry:
    """The combiner with the problem's threshold, if it takes thresholds."""
    if "thresholds" not in entry.combiner.__dataclass_fields__:
        return entry
    return replace(entry, combiner=replace(entry.combiner, thresholds={NAMES[1]: problem.threshold}))


def experience_of(
    problem: Problem,
    actions: Tensor,
    logprobs_B: Tensor,
    reference_B: Tensor,
    labels: torch.Generator | None,
    kl: RewardKL,
    group: int,
) -> Experience:
    """What a rollout would have collected: responses of one token each, scores, advantages within groups, wins.

    The rewards lie in [0, 1] and are read as probabilities to beat a fixed rival. With ``labels``, wins are sampled
    comparisons within the group instead: of each sample's reward plus Gumbel noise, so that any two of them are
    compared as Bradley and Terry's model says. A KL penalty is in ``kl_penalty_B``, not in the advantages.
    """
    rewards_BN = problem.rewards(actions)
    count = len(actions)
    mask_B1, valid_BN = torch.ones(count, 1, dtype=torch.bool), torch.ones(count, 2, dtype=torch.bool)
    advantages_B1N, _ = GroupRelative(standardize=False).estimate(
        rewards_BN.unsqueeze(1), None, mask_B1, valid_BN, group
    )
    wins_BN = rewards_BN
    if labels is not None:
        noise_BN = -(-torch.rand(rewards_BN.shape, generator=labels).log()).log()
        heard_GBN = (rewards_BN + noise_BN).unflatten(0, (-1, group))
        beaten = heard_GBN.unsqueeze(2) > heard_GBN.unsqueeze(1)
        wins_BN = (beaten.float().sum(2) / (group - 1)).flatten(0, 1)
    ids_BL, texts = torch.zeros(count, 2, dtype=torch.long), [""] * count
    return Experience(
        responses=Responses(ids_BL, torch.ones_like(ids_BL), mask_B1, ~mask_B1[:, 0], texts, texts, {}),
        rewards=RewardTable(NAMES, (True, True), rewards_BN, rewards_BN),
        valid_BN=valid_BN,
        mask_BT=mask_B1,
        behaviour_logprobs_BT=logprobs_B.unsqueeze(1),
        reference_logprobs_BT=reference_B.unsqueeze(1),
        advantages_BTN=advantages_B1N,
        returns_BTN=None,
        values_BTN=None,
        tokens_per_row=1.0,
        group_B=torch.arange(count) // group,
        wins_BN=wins_BN,
        kl_penalty_B=kl.init_kl_coef * (logprobs_B - reference_B),
        kl_coefficient=kl.init_kl_coef,
    )


def signals_of(experience: Experience, slopes_BP: Tensor, clip_range: ClipRange) -> Signals:
    """Signals right after sampling: the ratio is 1, and the Gram matrix is that of the parameters' gradients."""

    def gramian(slopes_B1N: Tensor) -> Tensor:
        gradients_NP = slopes_B1N.squeeze(1).T @ slopes_BP / len(slopes_BP)
        return gradients_NP @ gradients_NP.T

    ratio_BT = torch.ones_like(experience.behaviour_logprobs_BT)
    return replace(experience, ratio_BT=ratio_BT, clip_range=clip_range, gramian=gramian)


def learn(problem: Problem, entry: Entry, recipe: Recipe, seed: int) -> Run:
    """Train from the seed's start; one update on each batch of samples."""
    entry = prepared(entry, problem)
    combiner, loss = entry.combiner, entry.loss
    kl = RewardKL(init_kl_coef=problem.kl if Signal.KL_PENALTY in combiner.needs else 0.0)
    labelled = isinstance(loss, PairwiseLogistic)
    if labelled:
        loss = replace(loss, beta=problem.kl)
    generator = torch.Generator().manual_seed(seed)
    parameters_P = problem.start(generator).requires_grad_()
    first_P = parameters_P.detach().clone()
    optimizer = torch.optim.Adam([parameters_P], lr=problem.lr)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, recipe.steps)
    state = combiner.init(NAMES, torch.ones(2))
    for step in range(recipe.steps):
        now_P = parameters_P.detach()
        if step % recipe.evaluate_every == 0:
            state = combiner.observe_evaluation(torch.tensor(problem.values(now_P)).float(), state)
        actions = problem.sample(now_P, recipe.samples, generator)
        logprobs_B = problem.logprobs(parameters_P, actions)
        reference_B = problem.logprobs(first_P, actions)
        labels = generator if labelled else None
        experience = experience_of(problem, actions, logprobs_B.detach(), reference_B, labels, kl, recipe.group)
        state = combiner.observe(experience, state)
        combined = combiner.combine(signals_of(experience, problem.slopes(now_P, actions), loss.clip_range), state)
        state = state if combined.state is None else combined.state
        nothing_B1 = torch.zeros(len(actions), 1)
        output = PolicyOutput(logprobs_B.unsqueeze(1), nothing_B1, None, nothing_B1.unsqueeze(2))
        optimizer.zero_grad()
        loss(combined, experience, output, kl).loss.backward()
        optimizer.step()
        scheduler.step()
    values_2 = problem.values(parameters_P.detach())
    constrained = "thresholds" in combiner.__dataclass_fields__
    from_optimum = float(np.linalg.norm(values_2 - problem.constrained)) if constrained else None
    return Run(values_2, problem.distance(values_2), from_optimum)
