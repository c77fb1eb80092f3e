"""Sources: collect experience and compute the N objectives' signals from it.

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
    """The policy and everything else that collecting a batch needs."""

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
        """The signals that combiners and losses can read from this source."""

    @property
    def reads_candidates(self) -> bool:
        """Whether the responses come from the data, so that their labels can be used."""
        return False

    @property
    def penalises(self) -> bool:
        """Whether a penalty is subtracted from every objective of some responses."""
        return False

    def check(self, columns: set[str]) -> None:
        """Refuse data whose columns do not suit this source, before any model is loaded.

        Raises:
            UserError: one line that says how to correct it.
        """

    @property
    @abstractmethod
    def needs_values(self) -> bool:
        """Whether the policy must have value heads."""

    @property
    @abstractmethod
    def updates_per_batch(self) -> int:
        """Minibatches, and so updates, per collected batch, over all passes."""

    @property
    @abstractmethod
    def minibatches(self) -> int:
        """Minibatches in one pass over a collected batch."""

    @property
    @abstractmethod
    def responses_per_prompt(self) -> int:
        """Rows of experience for each prompt."""

    @property
    @abstractmethod
    def temperature(self) -> float:
        """Temperature of the distribution whose log-probabilities are trained."""

    @abstractmethod
    def encoder(self, policy_tokenizer: object, end_ids: tuple[int, ...], context_length: int | None) -> Encoder:
        """Build the encoder for this source's lengths."""

    @abstractmethod
    def collect(self, batch: PromptBatch, actors: Actors, seed: int) -> Experience:
        """Collect experience on a batch of prompts. All random numbers come from ``seed``."""

    @abstractmethod
    def evaluate(self, batch: PromptBatch, actors: Actors, seed: int) -> Evaluation:
        """Respond to a batch of prompts and score the responses. All random numbers come from ``seed``."""

    def log_prior(self, log_ratio_B: Tensor, group_B: Tensor, limit: float) -> tuple[Tensor, dict[str, float]]:
        """Truncated log-weight of each row under the reference, among the rows of its prompt, and metrics.

        Args:
            log_ratio_B: log-probability under the reference minus that under the policy that sampled.
            group_B: index of each row's prompt.
            limit: of the truncation, in nats.

        Returns:
            The log-weights, and the metrics over all processes: ``prior_ess``, the effective sample size as a share of
            a prompt's rows, and ``prior_truncated``, the share of rows that were truncated.
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
        """Attach the signals that depend on the policy's current output to some rows of experience.

        Args:
            experience: the rows.
            output: of the policy on these rows, with its autograd graph.
            clip_range: of the loss.
            parameters: the Gram matrix is of gradients with respect to these; ``None`` is the shared representation.
        """
        mask_BT = experience.mask_BT
        ratio_BT = clip_range.ratio(output.logprobs_BT.detach(), experience.behaviour_logprobs_BT, mask_BT)

        def gramian(slopes_BTN: Tensor) -> Tensor:
            if parameters is not None:
                return _parameter_gramian(output.logprobs_BT.where(mask_BT, 0.0), slopes_BTN, parameters)
            # Only the head lies between the hidden state and the log-probabilities. The loss needs its graph again.
            (gradient_BTD,) = torch.autograd.grad(
                output.logprobs_BT.where(mask_BT, 0.0).sum(), output.hidden_BTD, retain_graph=True
            )
            squared_norms_BT = gradient_BTD.float().square().sum(-1)
            return all_sum(representation_gramian(slopes_BTN, squared_norms_BT))

        return replace(experience, ratio_BT=ratio_BT, clip_range=clip_range, gramian=gramian)


def check_prompt_length(max_prompt_length: int | None) -> None:
    """Validate ``max_prompt_length``.

    Raises:
        UserError: it is less than one token.
    """
    if max_prompt_length is not None and max_prompt_length < 1:
        raise UserError(f"source.max_prompt_length must be at least 1 or null, got {max_prompt_length}")


def _parameter_gramian(logprobs_BT: Tensor, slopes_BTN: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    # Gradients of the global batch are sums over the processes, so they are summed before they are multiplied. One
    # parameter at a time needs no second copy of all gradients.
    gradients = parameter_gradients(logprobs_BT, slopes_BTN, parameters)
    gram_NN = torch.zeros(len(gradients), len(gradients), dtype=torch.float64, device=logprobs_BT.device)
    for of_objectives in zip(*gradients, strict=True):
        summed_NP = all_sum(torch.stack(of_objectives).flatten(1).float())
        gram_NN += (summed_NP @ summed_NP.T).double()
    return gram_NN
