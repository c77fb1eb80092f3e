"""Preference rows: responses and preference labels come from the data.

Legend: P prompts, B candidates of all prompts, T response tokens, N objectives.
"""

import time
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from moa_lightning.distributed import all_sum, world_size
from moa_lightning.errors import UserError
from moa_lightning.functional.preference import bradley_terry_wins, group_softmax
from moa_lightning.models.encoding import Encoder
from moa_lightning.signals import Signal
from moa_lightning.sources.base import Actors, Source, check_prompt_length
from moa_lightning.sources.rollout import evaluating
from moa_lightning.types import Evaluation, Experience, PromptBatch, Responses, RewardTable

_OF_CANDIDATES = ("wins/", "scores/")  # columns with an entry for each of a row's candidates


@dataclass
class PreferenceRows(Source):
    """Reads responses and labels from preference data. It generates nothing and needs no pointwise reward.

    An objective with reward ``FromLabels`` is the data's label. Any other reward scores the candidates, and the
    Bradley-Terry model turns the scores into win probabilities. Combiners that read advantages get the win probability
    minus 1/2.

    Evaluation generates nothing either. For each held-out prompt it reports the win probability that the policy would
    have if it chose among the prompt's candidates: ``sum_y w(y) p(y)`` with ``w ~ pi/mu``. The policy as it was loaded
    has equal w, so 1/2. No label of these prompts has influenced a weight, so the mean is an unbiased estimate, even if
    labels are single votes. A prompt counts only for objectives that label all of its candidates: with missing labels,
    the mean over the others would be biased towards 1/2.

    Args:
        max_response_length: longest response in tokens, including its end token; longer ones are refused.
        max_prompt_length: keep only this many last tokens of a prompt; ``None`` refuses prompts that do not fit.
        win_scale: difference in a reward's value at which the better response wins 73 % of the time.
        prior: what the candidates of a row are. ``sampled``: samples of the policy as it was loaded; with a lagged
            reference, each carries the ratio of the two. ``listed``: all possible responses; each carries the
            reference's probability.
        max_log_ratio: the logarithm of that ratio is clipped to this distance from its mean over the prompt's
            candidates, in nats.
    """

    max_response_length: int = 512
    max_prompt_length: int | None = None
    win_scale: float = 1.0
    prior: Literal["sampled", "listed"] = "sampled"
    max_log_ratio: float = 5.0

    def __post_init__(self) -> None:
        if self.max_response_length < 2:
            raise UserError(
                f"source.max_response_length must be at least 2 (a token and the end), got {self.max_response_length}"
            )
        for name in ("win_scale", "max_log_ratio"):
            if not getattr(self, name) > 0:
                raise UserError(f"source.{name} must be above 0, got {getattr(self, name)}")
        check_prompt_length(self.max_prompt_length)

    @property
    def provides(self) -> frozenset[Signal]:
        """All signals but ``SAMPLES`` (the policy does not sample the responses) and ``PAIRS`` (the loss has it)."""
        return frozenset({Signal.ADVANTAGES, Signal.SCORES, Signal.RATIO, Signal.GRAMIAN, Signal.WINS, Signal.GROUPS})

    @property
    @override
    def reads_candidates(self) -> bool:
        return True

    def check(self, columns: set[str]) -> None:
        """Refuse data without a column ``responses``."""
        if "responses" not in columns:
            raise UserError(
                "source PreferenceRows reads prompts with candidate responses, which these data do not have; use data "
                "class Preferences, or source Rollout"
            )

    @property
    @override
    def needs_values(self) -> bool:
        return False

    @property
    @override
    def minibatches(self) -> int:
        return 1

    @property
    @override
    def updates_per_batch(self) -> int:
        return 1

    @property
    def responses_per_prompt(self) -> int:
        """1: the number of candidates differs between rows, so one is all that can be relied on."""
        return 1

    @property
    @override
    def temperature(self) -> float:
        return 1.0

    @override
    def encoder(self, policy_tokenizer: object, end_ids: tuple[int, ...], context_length: int | None) -> Encoder:
        return Encoder(
            policy_tokenizer,  # type: ignore[arg-type]  # sources may do without a tokenizer
            end_ids,
            context_length,
            self.max_response_length if context_length is None else min(self.max_response_length, context_length - 1),
            self.max_prompt_length,
            with_candidates=True,
        )

    def collect(self, batch: PromptBatch, actors: Actors, seed: int) -> Experience:
        """Read the candidates and their labels, and compute log-probabilities under the policy and its reference."""
        started = time.perf_counter()
        responses, group_B, rewards, wins_BN = self._candidates(batch, actors)
        scored = time.perf_counter()
        logprobs_BT, reference_BT, loaded_BT = self._logprobs(responses, group_B, actors)
        log_prior_B, of_prior = self._log_prior(reference_BT, loaded_BT, group_B)
        wins_BN = wins_BN[:, list(rewards.trained)]
        valid_BN = wins_BN.isfinite()
        mask_BT = responses.mask_BT & valid_BN.any(1, keepdim=True)
        advantages_BN = (wins_BN - 0.5).where(valid_BN, 0.0)
        trained, tokens, rows = all_sum(
            torch.stack([mask_BT.sum(), responses.lengths_B.sum(), torch.tensor(len(group_B)).to(group_B)]).double()
        ).tolist()
        return Experience(
            responses=responses,
            rewards=rewards,
            valid_BN=valid_BN,
            mask_BT=mask_BT,
            behaviour_logprobs_BT=logprobs_BT,
            reference_logprobs_BT=reference_BT,
            advantages_BTN=advantages_BN.unsqueeze(1) * mask_BT.unsqueeze(-1),
            returns_BTN=None,
            values_BTN=None,
            tokens_per_row=trained / rows,
            row_share=rows / world_size() / max(len(group_B), 1),
            group_B=group_B,
            wins_BN=wins_BN,
            log_prior_B=log_prior_B,
            sequences=int(rows),
            tokens=tokens,
            log_policy_B=self._log_policy(logprobs_BT, reference_BT, loaded_BT),
            seconds={"scoring": scored - started, "forward": time.perf_counter() - scored},
            metrics=of_prior,
        )

    def evaluate(self, batch: PromptBatch, actors: Actors, seed: int) -> Evaluation:
        """Return each prompt's likeliest candidate, and the policy's win probabilities among the candidates."""
        responses, group_B, rewards, wins_BN = self._candidates(batch, actors)
        logprobs_BT, reference_BT, loaded_BT = self._logprobs(responses, group_B, actors)
        ratio_B = (logprobs_BT - (reference_BT if loaded_BT is None else loaded_BT)).sum(1)
        weight_B = group_softmax(self._log_policy(logprobs_BT, reference_BT, loaded_BT), group_B)
        count = len(batch.prompts)
        # NaN in one candidate's label makes the prompt's value NaN, so the prompt is skipped.
        wins_PN = wins_BN.new_zeros(count, wins_BN.shape[1]).index_add(0, group_B, weight_B.unsqueeze(1) * wins_BN)
        kl_P = ratio_B.new_zeros(count).index_add(0, group_B, weight_B * ratio_B)
        rows = [(group_B == p).nonzero().flatten() for p in range(count)]
        best = [int(candidates[weight_B[candidates].argmax()]) for candidates in rows]
        chosen = Responses(
            input_ids_BL=responses.input_ids_BL[best],
            attention_mask_BL=responses.attention_mask_BL[best],
            mask_BT=responses.mask_BT[best],
            truncated_B=responses.truncated_B[best],
            prompts=[responses.prompts[b] for b in best],
            completions=[responses.completions[b] for b in best],
            columns={},
        )
        return Evaluation(chosen, RewardTable(rewards.names, rewards.trained, wins_PN, wins_PN), kl_P)

    def _candidates(self, batch: PromptBatch, actors: Actors) -> tuple[Responses, Tensor, RewardTable, Tensor]:
        """Responses, index of their prompts, rewards and win probabilities of all objectives."""
        candidates = batch.columns["responses"]
        responses, group_B = actors.encoder.encode_candidates(batch, candidates)
        # Columns with an entry for each candidate are flattened; the others are repeated for each candidate.
        columns = {
            name: [value for values in column for value in values]
            if name.startswith(_OF_CANDIDATES)
            else [column[i] for i in group_B.tolist()]
            for name, column in batch.columns.items()
            if name != "responses"
        }
        device = group_B.device
        table = actors.panel.score(responses.prompts, responses.completions, columns)
        rewards = replace(table, raw_BN=table.raw_BN.to(device), value_BN=table.value_BN.to(device))
        wins_BN = rewards.value_BN.clone()
        compared = [i for i, name in enumerate(rewards.names) if not actors.panel.objectives[name].reward.gives_wins]
        for p in range(len(candidates)) if compared else ():
            rows = (group_B == p).nonzero().flatten()
            scores_PKN = rewards.value_BN[rows][:, compared].unsqueeze(0)
            wins_BN[rows.unsqueeze(1), torch.tensor(compared, device=device)] = bradley_terry_wins(
                scores_PKN, self.win_scale
            )[0]
        return responses, group_B, rewards, wins_BN

    @torch.no_grad()
    def _logprobs(self, responses: Responses, group_B: Tensor, actors: Actors) -> tuple[Tensor, Tensor, Tensor | None]:
        """Log-probabilities under the policy, its reference, and the loaded policy (``None``: it is the reference)."""
        inputs = (responses.input_ids_BL, responses.attention_mask_BL, responses.mask_BT, self.temperature)
        with evaluating(actors.policy):
            logprobs_BT = actors.policy(*inputs).logprobs_BT
            reference_BT = actors.reference.logprobs(actors.policy, *inputs, group_B)
            loaded_BT = actors.reference.behaviour_logprobs(actors.policy, *inputs)
        return logprobs_BT, reference_BT, loaded_BT

    def _log_policy(self, logprobs_BT: Tensor, reference_BT: Tensor, loaded_BT: Tensor | None) -> Tensor:
        """Log-weight of each candidate under the policy: of pi/mu, or of pi where all responses are listed."""
        if self.prior == "listed":
            return logprobs_BT.sum(1)
        return (logprobs_BT - (reference_BT if loaded_BT is None else loaded_BT)).sum(1)

    def _log_prior(
        self, reference_BT: Tensor, loaded_BT: Tensor | None, group_B: Tensor
    ) -> tuple[Tensor | None, dict[str, float]]:
        """Log-weight of each candidate under the reference (``None`` if candidates are samples of it), and metrics."""
        if self.prior == "listed":
            return reference_BT.sum(1), {}
        if loaded_BT is None:
            return None, {}
        return self.log_prior((reference_BT - loaded_BT).sum(1), group_B, self.max_log_ratio)
