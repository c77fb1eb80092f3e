"""Sources: where N signals come from.

Legend: B sequences, T tokens, N objectives.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moa_lightning.distributed import all_sum
from moa_lightning.errors import UserError
from moa_lightning.functional.gramian import parameter_gradients, representation_gramian
from moa_lightning.functional.preference import truncated_log_ratio
from moa_lightning.losses.kl import KLPenalty
from moa_lightning.models.encoding import Encoder
from moa_lightning.models.policy import Policy, PolicyOutput
from moa_lightning.models.reference import Reference
from moa_lightning.rewards.panel import RewardPanel
from moa_lightning.signals import ClipRange, Signal, Signals
from moa_lightning.types import Evaluation, Experience, PromptBatch, State


@dataclass(frozen=True)
class Actors:
    """Who takes part in collecting a batch."""

    policy: Policy
    reference: Reference
    panel: RewardPanel
    encoder: Encoder
    kl: KLPenalty
    kl_state: State


class Source(ABC):
    """Turns batches of prompts into experience, and experience into signals. Subclasses are dataclasses."""

    @property
    @abstractmethod
    def provides(self) -> frozenset[Signal]:
        """The signals that combiners can have from it."""

    @property
    def reads_candidates(self) -> bool:
        """Whether the responses are the data's own, so that their labels count."""
        return False

    @property
    def penalises(self) -> bool:
        """Whether some responses lose a penalty in every objective, beside what the rewards give them."""
        return False

    def check(self, columns: set[str]) -> None:
        """Refuse data with these columns that it cannot work on, before any model is loaded.

        Raises:
            UserError: one line that says what to write instead.
        """

    @property
    @abstractmethod
    def needs_values(self) -> bool:
        """Whether the policy must have value heads."""

    @property
    @abstractmethod
    def updates_per_batch(self) -> int:
        """Minibatches that one collected batch is handed out in, all passes over it together."""

    @property
    @abstractmethod
    def minibatches(self) -> int:
        """Minibatches in one pass over a collected batch."""

    @property
    @abstractmethod
    def responses_per_prompt(self) -> int:
        """Rows of experience that one prompt becomes."""

    @property
    @abstractmethod
    def temperature(self) -> float:
        """Of the distribution whose log-probabilities are trained."""

    @abstractmethod
    def encoder(self, policy_tokenizer: object, end_ids: tuple[int, ...], context_length: int | None) -> Encoder:
        """The encoder for this source's lengths."""

    @abstractmethod
    def collect(self, batch: PromptBatch, actors: Actors, seed: int) -> Experience:
        """Experience from a batch of prompts. Draws random numbers from ``seed`` alone."""

    @abstractmethod
    def evaluate(self, batch: PromptBatch, actors: Actors, seed: int) -> Evaluation:
        """Responses to a batch of prompts with their scores. Draws random numbers from ``seed`` alone."""

    def log_prior(self, log_ratio_B: Tensor, group_B: Tensor, limit: float) -> tuple[Tensor, dict[str, float]]:
        """Log-weight of each row under the reference among the rows of its prompt, truncated, and what to log of it.

        Args:
            log_ratio_B: log-probability under the reference less that under the policy that sampled.
            group_B: the prompt of each row.
            limit: of the truncation, in nats.

        Returns:
            The log-weights; ``prior_ess``, the effective sample size as a share of a prompt's rows, and
            ``prior_truncated``, the share that was cut, over all processes.
        """
        weights_B, ess_B, cut_B = truncated_log_ratio(log_ratio_B.float(), group_B, limit)
        ess, cut, rows = all_sum(torch.stack([ess_B.sum(), cut_B.float().sum(), ess_B.new_tensor(len(ess_B))])).tolist()
        return weights_B, {"prior_ess": ess / rows, "prior_truncated": cut / rows}

    def signals(
        self,
        experience: Experience,
        output: PolicyOutput,
        clip_range: ClipRange,
        parameters: Sequence[Tensor] | None = None,
    ) -> Signals:
        """Some rows of experience with the signals that the policy's present output on them adds.

        Args:
            experience: the rows.
            output: with its graph.
            clip_range: of the loss that follows.
            parameters: where the Gram matrix takes its gradients; ``None`` is the shared representation.
        """
        mask_BT = experience.mask_BT
        ratio_BT = clip_range.ratio(output.logprobs_BT.detach(), experience.behaviour_logprobs_BT, mask_BT)

        def gramian(slopes_BTN: Tensor) -> Tensor:
            if parameters is not None:
                return _parameter_gramian(output.logprobs_BT.where(mask_BT, 0.0), slopes_BTN, parameters)
            # The graph from the hidden state to the log-probabilities is the head alone, and is kept for the loss.
            (gradient_BTD,) = torch.autograd.grad(
                output.logprobs_BT.where(mask_BT, 0.0).sum(), output.hidden_BTD, retain_graph=True
            )
            squared_norms_BT = gradient_BTD.float().square().sum(-1)
            return all_sum(representation_gramian(slopes_BTN, squared_norms_BT))

        return replace(experience, ratio_BT=ratio_BT, clip_range=clip_range, gramian=gramian)


def check_prompt_length(max_prompt_length: int | None) -> None:
    """Refuse to keep less than one token of a prompt.

    Raises:
        UserError: with the length.
    """
    if max_prompt_length is not None and max_prompt_length < 1:
        raise UserError(f"source.max_prompt_length must be at least 1 or null, got {max_prompt_length}")


def _parameter_gramian(logprobs_BT: Tensor, slopes_BTN: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    # The gradients of the whole batch are sums over the processes, so these have to be summed before they are
    # multiplied; one parameter at a time, so that no second copy of all of them is held.
    gradients = parameter_gradients(logprobs_BT, slopes_BTN, parameters)
    gram_NN = torch.zeros(len(gradients), len(gradients), dtype=torch.float64, device=logprobs_BT.device)
    for of_objectives in zip(*gradients, strict=True):
        whole_NP = all_sum(torch.stack(of_objectives).flatten(1).float())
        gram_NN += (whole_NP @ whole_NP.T).double()
    return gram_NN
