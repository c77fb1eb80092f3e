"""Rollouts: sample responses, score them with the panel, estimate advantages.

Legend: B sequences, P prompt tokens, T response tokens, L = P + T, N trained objectives, G responses to one prompt.
"""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from typing_extensions import override

from moa_lightning.distributed import all_sum, any_rank, rank
from moa_lightning.errors import UserError
from moa_lightning.functional.preference import bradley_terry_wins
from moa_lightning.losses.kl import penalty_in_reward
from moa_lightning.models.encoding import Encoder
from moa_lightning.models.policy import Policy, PolicyOutput
from moa_lightning.rewards.panel import RewardPanel
from moa_lightning.signals import Signal
from moa_lightning.sources.advantages import GAE, AdvantageEstimator
from moa_lightning.sources.base import Actors, Source, check_prompt_length
from moa_lightning.types import Evaluation, Experience, PromptBatch, Responses, RewardTable
from moa_lightning.utils.non_finite import NonFiniteError

if TYPE_CHECKING:
    from transformers import GenerationConfig


@dataclass
class Rollout(Source):
    """Samples responses from the policy and scores them with the reward panel.

    The reward of a response is assigned to its last real token. A response truncated at ``max_new_tokens`` is scored
    like any other, unless ``missing_eos_penalty`` or ``mask_truncated_completions`` is set.

    Args:
        max_new_tokens: longest response, in tokens.
        num_generations: responses sampled for each prompt.
        temperature: of sampling; the trained log-probabilities are those of the tempered distribution.
        top_k: sample among this many most likely tokens; 0 among all.
        top_p: sample from the most likely tokens up to this probability mass; 1 is all of it.
        num_iterations: passes over each collected batch.
        num_mini_batches: optimiser minibatches in one pass; must divide the responses of a batch.
        advantages: estimates advantages from rewards.
        missing_eos_penalty: subtracted from every objective of a truncated response; ``None`` subtracts nothing. It
            does not change win probabilities that a reward computes itself (``WinProbability``,
            ``PairwisePreference``), so there it has no effect on a combiner that reads nothing else, such as ``MOPO``.
        mask_truncated_completions: leave truncated responses out of the update.
        win_scale: difference in an objective's value at which the better response wins 73 % of the time, by the
            Bradley-Terry model; for combiners that read win probabilities. The rivals are the prompt's other responses,
            so a threshold of 0.5 only asks for the policy's own current average. Rewards ``WinProbability``, and
            ``PairwisePreference`` with a ``baseline``, compare with fixed responses instead.
        max_log_ratio: for the same combiners, each response carries the ratio of the reference to the policy that
            sampled it. Its logarithm is clipped to this distance from its mean over the prompt's responses, in nats.
        max_prompt_length: keep only this many last tokens of a prompt; ``None`` refuses prompts that do not fit.
    """

    max_new_tokens: int = 64
    num_generations: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    num_iterations: int = 1
    num_mini_batches: int = 1
    advantages: AdvantageEstimator = field(default_factory=GAE)
    missing_eos_penalty: float | None = None
    mask_truncated_completions: bool = False
    max_prompt_length: int | None = None
    win_scale: float = 1.0
    max_log_ratio: float = 5.0

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "num_generations", "num_iterations", "num_mini_batches"):
            if getattr(self, name) < 1:
                raise UserError(f"source.{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.temperature < math.inf:
            raise UserError(
                f"source.temperature must be a finite number above 0 (rollouts are sampled), got {self.temperature}"
            )
        if not 0 < self.top_p <= 1:
            raise UserError(f"source.top_p must lie in (0, 1], got {self.top_p}")
        if self.top_k < 0:
            raise UserError(f"source.top_k must be at least 0, got {self.top_k}")
        for name in ("win_scale", "max_log_ratio"):
            if not getattr(self, name) > 0:
                raise UserError(f"source.{name} must be above 0, got {getattr(self, name)}")
        if self.missing_eos_penalty is not None and not math.isfinite(self.missing_eos_penalty):
            raise UserError(
                f"source.missing_eos_penalty must be a finite number or null, got {self.missing_eos_penalty}"
            )
        check_prompt_length(self.max_prompt_length)
        self.advantages.check(self.num_generations)

    @property
    def provides(self) -> frozenset[Signal]:
        """The signals that combiners can read; groups and win probabilities need several responses to a prompt."""
        always = {Signal.ADVANTAGES, Signal.SCORES, Signal.RATIO, Signal.GRAMIAN, Signal.SAMPLES, Signal.KL_PENALTY}
        return frozenset(always | ({Signal.WINS, Signal.GROUPS} if self.num_generations > 1 else set()))

    @property
    @override
    def penalises(self) -> bool:
        return bool(self.missing_eos_penalty)

    @property
    @override
    def needs_values(self) -> bool:
        return self.advantages.needs_values

    @property
    @override
    def minibatches(self) -> int:
        return self.num_mini_batches

    @property
    @override
    def updates_per_batch(self) -> int:
        return self.num_mini_batches * self.num_iterations

    @property
    @override
    def responses_per_prompt(self) -> int:
        return self.num_generations

    @override
    def encoder(self, policy_tokenizer: object, end_ids: tuple[int, ...], context_length: int | None) -> Encoder:
        return Encoder(
            policy_tokenizer,  # type: ignore[arg-type]  # sources other than this one may not need a tokenizer
            end_ids,
            context_length,
            self.max_new_tokens,
            self.max_prompt_length,
        )

    def collect(self, batch: PromptBatch, actors: Actors, seed: int) -> Experience:
        """Sample responses, score them, and estimate advantages."""
        started = time.perf_counter()
        responses = self._respond(batch, actors, seed, self.num_generations)
        _require_finite(any_rank(not actors.policy.sampled_from_finite, responses.input_ids_BL.device))
        generated = time.perf_counter()
        rewards = actors.panel.score(responses.prompts, responses.completions, responses.columns)
        rewards = _to_device(rewards, responses.input_ids_BL.device)
        scored = time.perf_counter()

        group_B = torch.arange(len(responses.prompts), device=responses.mask_BT.device) // self.num_generations
        output, reference_logprobs_BT = _policy_and_reference(actors, responses, self.temperature, group_B)
        kl_BT = output.logprobs_BT - reference_logprobs_BT
        valid_BN = rewards.valid_BN
        mask_BT = responses.mask_BT & valid_BN.any(1, keepdim=True)
        if self.mask_truncated_completions:
            mask_BT = mask_BT & ~responses.truncated_B.unsqueeze(1)
        kl_coefficient = actors.kl.reward_coefficient(actors.kl_state)
        penalty_BT, penalty_B = penalty_in_reward(kl_BT, kl_coefficient)
        token_rewards_BTN = self._token_rewards(responses, rewards, penalty_BT)
        advantages_BTN, returns_BTN = self.advantages.estimate(
            token_rewards_BTN, output.values_BTN, mask_BT, valid_BN, self.num_generations
        )
        wins_BN, log_prior_B, of_prior = self._compared(responses, rewards, -kl_BT.sum(1), group_B, actors.panel)
        sums = all_sum(
            torch.stack([kl_BT.sum(), mask_BT.sum(), responses.lengths_B.sum(), torch.tensor(len(kl_BT)).to(kl_BT)])
        ).tolist()
        return Experience(
            responses=responses,
            rewards=rewards,
            valid_BN=valid_BN,
            mask_BT=mask_BT,
            behaviour_logprobs_BT=output.logprobs_BT,
            reference_logprobs_BT=reference_logprobs_BT,
            advantages_BTN=advantages_BTN,
            returns_BTN=returns_BTN,
            values_BTN=output.values_BTN,
            tokens_per_row=sums[1] / sums[3],
            group_B=group_B,
            wins_BN=wins_BN,
            log_prior_B=log_prior_B,
            # The rows are samples of the policy, so all have the same weight.
            log_policy_B=None if wins_BN is None else torch.zeros_like(kl_BT[:, 0]),
            moving_BN=self._moving(rewards, actors.panel),
            penalty_B=self._penalty(responses),
            kl_penalty_B=penalty_B,
            sequences=int(sums[3]),
            tokens=sums[2],
            kl=sums[0] / sums[3],
            kl_coefficient=kl_coefficient,
            seconds={
                "generation": generated - started,
                "scoring": scored - generated,
                "forward": time.perf_counter() - scored,
            },
            metrics=of_prior,
        )

    def evaluate(self, batch: PromptBatch, actors: Actors, seed: int) -> Evaluation:
        """Sample one response to each prompt, with the same settings, and score it."""
        responses = self._respond(batch, actors, seed, 1)
        _require_finite(not actors.policy.sampled_from_finite)  # processes may have different numbers of batches
        rewards = actors.panel.score(responses.prompts, responses.completions, responses.columns)
        output, reference_logprobs_BT = _policy_and_reference(actors, responses, self.temperature)
        kl_B = (output.logprobs_BT - reference_logprobs_BT).sum(1)
        return Evaluation(responses, _to_device(rewards, kl_B.device), kl_B)

    def _compared(
        self, responses: Responses, rewards: RewardTable, log_ratio_B: Tensor, group_B: Tensor, panel: RewardPanel
    ) -> tuple[Tensor | None, Tensor | None, dict[str, float]]:
        """Win probabilities among a prompt's responses, their log-weights under the reference, and metrics."""
        if self.num_generations == 1:
            return None, None, {}
        scores_PKN = self._penalised(responses, rewards.trained_BN).unflatten(0, (-1, self.num_generations))
        wins_BN = bradley_terry_wins(scores_PKN, self.win_scale).flatten(0, 1)
        compared = [panel.objectives[name].reward.gives_wins for name in rewards.trained_names]
        wins_BN = torch.where(torch.tensor(compared, device=wins_BN.device), rewards.trained_BN, wins_BN)
        return wins_BN, *self.log_prior(log_ratio_B, group_B, self.max_log_ratio)

    def _moving(self, rewards: RewardTable, panel: RewardPanel) -> Tensor:
        """Whether an objective's win probabilities are against the prompt's other responses."""
        moving = [not panel.objectives[name].reward.fixed_rivals for name in rewards.trained_names]
        return torch.tensor(moving, device=rewards.raw_BN.device).expand(len(rewards.raw_BN), -1)

    def _penalty(self, responses: Responses) -> Tensor | None:
        return None if self.missing_eos_penalty is None else self.missing_eos_penalty * responses.truncated_B

    def _penalised(self, responses: Responses, value_BN: Tensor) -> Tensor:
        penalty_B = self._penalty(responses)
        return value_BN if penalty_B is None else value_BN - penalty_B.unsqueeze(1)

    def _token_rewards(self, responses: Responses, rewards: RewardTable, penalty_BT: Tensor) -> Tensor:
        value_BN = self._penalised(responses, rewards.trained_BN.where(rewards.valid_BN, 0.0))
        rewards_BTN = (-penalty_BT).unsqueeze(-1).repeat(1, 1, value_BN.shape[1])
        last_B = (responses.lengths_B - 1).clamp(min=0)  # the end token, or the last token if truncated; never padding
        rewards_BTN[torch.arange(len(last_B), device=last_B.device), last_B] += value_BN
        return rewards_BTN

    def _respond(self, batch: PromptBatch, actors: Actors, seed: int, count: int) -> Responses:
        if count > 1:
            batch = PromptBatch(
                prompts=[p for p in batch.prompts for _ in range(count)],
                given=[p for p in batch.given for _ in range(count)],
                columns={k: [v for v in values for _ in range(count)] for k, values in batch.columns.items()},
                input_ids_BP=batch.input_ids_BP.repeat_interleave(count, 0),
                attention_mask_BP=batch.attention_mask_BP.repeat_interleave(count, 0),
            )
        config = self._generation_config(actors.policy)
        with evaluating(actors.policy), random_numbers_from(seed, batch.input_ids_BP.device):
            sequences_BL = actors.policy.generate(batch.input_ids_BP, batch.attention_mask_BP, config)
        return actors.encoder.decode(batch, sequences_BL)

    def _generation_config(self, policy: Policy) -> "GenerationConfig":
        from transformers import GenerationConfig

        return GenerationConfig(
            do_sample=True,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            eos_token_id=policy.end_ids,
            pad_token_id=policy.tokenizer.pad_token_id,
            use_cache=True,
        )


@torch.no_grad()
def _policy_and_reference(
    actors: Actors, responses: Responses, temperature: float, group_B: Tensor | None = None
) -> tuple[PolicyOutput, Tensor]:
    inputs = (responses.input_ids_BL, responses.attention_mask_BL, responses.mask_BT, temperature)
    with evaluating(actors.policy):
        output: PolicyOutput = actors.policy(*inputs)
        reference_logprobs_BT = actors.reference.logprobs(actors.policy, *inputs, group_B)
    return output, reference_logprobs_BT


@contextmanager
def evaluating(policy: Policy) -> Iterator[None]:
    """Context manager: puts the policy in evaluation mode."""
    training = policy.training
    policy.eval()
    try:
        yield
    finally:
        policy.train(training)


@contextmanager
def random_numbers_from(seed: int, device: torch.device) -> Iterator[None]:
    """Context manager: seeds torch's generators with this seed and the rank, and restores them afterwards.

    What is sampled then depends only on the position in the run. A resumed run samples the same responses, and
    evaluations do not change the training.
    """
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed + 7_919 * rank())
        yield


def _require_finite(failed: bool) -> None:
    if failed:
        raise NonFiniteError("the policy's logits are not finite while it samples")


def _to_device(rewards: RewardTable, device: torch.device) -> RewardTable:
    return replace(rewards, raw_BN=rewards.raw_BN.to(device), value_BN=rewards.value_BN.to(device))
