"""The records that travel between the pieces.

Legend: B sequences, P prompt tokens (left-padded), T response tokens (right-padded), L = P + T, N objectives.
"""

from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moa_lightning.chat import Prompt
from moa_lightning.signals import Signals

State = dict[str, Tensor]
"""Memory of a combiner: float32 tensors by name, the same on every rank, saved in the checkpoint."""

Columns = dict[str, list[Any]]
"""The data's other columns, one entry per row."""


@dataclass
class PromptBatch:
    """Prompts as the policy reads them, with the rest of their rows."""

    prompts: list[str]  # chat template applied
    given: list[Prompt]  # as the data have them
    columns: Columns
    input_ids_BP: Tensor  # int64, left-padded
    attention_mask_BP: Tensor  # int64, 0 on padding
    stands_in: bool = False  # there only so that this process keeps step with the others: nothing of it counts

    def to(self, device: torch.device) -> "PromptBatch":
        """The same batch on a device; Lightning calls it."""
        return replace(
            self, input_ids_BP=self.input_ids_BP.to(device), attention_mask_BP=self.attention_mask_BP.to(device)
        )


@dataclass
class Responses:
    """What the policy answered."""

    input_ids_BL: Tensor
    attention_mask_BL: Tensor
    mask_BT: Tensor  # bool, 1 on response tokens, the end-of-sequence token included
    truncated_B: Tensor  # bool, no end-of-sequence token within the limit
    prompts: list[str]
    completions: list[str]  # special tokens removed
    columns: Columns

    @property
    def prompt_length(self) -> int:
        """P, the padded length of the prompts."""
        return self.input_ids_BL.shape[1] - self.mask_BT.shape[1]

    @property
    def lengths_B(self) -> Tensor:
        """Response lengths in tokens."""
        return self.mask_BT.sum(1)


@dataclass
class RewardTable:
    """Scores of B responses under every objective of the panel, eval-only ones included.

    NaN marks a response that an objective could not score.
    """

    names: tuple[str, ...]
    trained: tuple[bool, ...]  # False for eval-only objectives
    raw_BN: Tensor  # float32, as the reward returned it
    value_BN: Tensor  # float32, after the objective's affine transform and clip
    transforms: tuple[str, ...] = ()  # how values follow from raw scores, in words; empty where they are the same

    @property
    def transform_by_name(self) -> dict[str, str]:
        """``transforms`` of the objectives whose value is not the raw score."""
        return {name: words for name, words in zip(self.names, self.transforms, strict=False) if words}

    @property
    def trained_names(self) -> tuple[str, ...]:
        """The objectives that reach the combiner, in order."""
        return tuple(n for n, t in zip(self.names, self.trained, strict=True) if t)

    @property
    def trained_BN(self) -> Tensor:
        """``value_BN`` of the trained objectives only."""
        return self.value_BN[:, list(self.trained)]

    @property
    def valid_BN(self) -> Tensor:
        """Bool: which responses the trained objectives could score."""
        return torch.isfinite(self.trained_BN)


@dataclass(kw_only=True)
class Experience(Signals):
    """One collected batch, or some rows of it: everything that the updates on it need. N counts trained objectives.

    Its ``scores_BN`` are those of ``rewards`` less the penalty, 0 where invalid, whatever is passed for them.
    """

    responses: Responses
    rewards: RewardTable
    advantages_BTN: Tensor
    behaviour_logprobs_BT: Tensor  # of the policy that sampled, at the sampling temperature
    reference_logprobs_BT: Tensor
    returns_BTN: Tensor | None  # targets of the value heads; None without critics
    values_BTN: Tensor | None
    tokens_per_row: float  # trained tokens per row of the whole collected batch, over all ranks: the loss's divisor
    row_share: float = 1.0  # rows of the collected batch: mean over the processes, by this process's own number
    log_policy_B: Tensor | None = None  # as log_prior_B, under the policy; None where its wins would say nothing
    moving_BN: Tensor | None = None  # bool, wins against the policy's other responses of the moment; None is nowhere
    sequences: int = 0  # rows of the whole collected batch, over all processes
    tokens: float = 0.0  # of its responses, over all processes
    kl: float | None = None  # mean over its rows of log pi/pi_ref per response, in nats; None is not measured
    kl_coefficient: float | None = None  # of the KL penalty in its rewards; None is no such penalty
    seconds: dict[str, float] = field(default_factory=dict)  # generation, scoring, forward
    metrics: dict[str, float] = field(default_factory=dict)  # further scalars, which are only logged (prior_ess, …)

    def __post_init__(self) -> None:
        """Scores of the trained objectives as they count."""
        scores_BN = self.rewards.trained_BN
        if self.penalty_B is not None:
            scores_BN = scores_BN - self.penalty_B.unsqueeze(1)
        self.scores_BN = scores_BN.where(self.valid_BN, 0.0)

    def __len__(self) -> int:
        """B, the number of rows."""
        return self.mask_BT.shape[0]

    @property
    def counted_rows(self) -> float:
        """Rows that a loss divides its sum by: the mean of the processes' losses is then that of all rows."""
        return max(len(self) * self.row_share, 1e-8)

    def select(self, rows: Tensor) -> "Experience":
        """The given rows, in the given order."""
        picked: dict[str, Any] = {
            f.name: getattr(self, f.name)[rows] for f in fields(self) if isinstance(getattr(self, f.name), Tensor)
        }
        return replace(
            self,
            responses=_select_rows(self.responses, rows),
            rewards=_select_rows(self.rewards, rows),
            **picked,
        )


def _select_rows(record: Any, rows: Tensor) -> Any:
    indices = rows.tolist()

    def pick(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[rows]
        if isinstance(value, list):
            return [value[i] for i in indices]
        if isinstance(value, dict):
            return {k: pick(v) for k, v in value.items()}
        return value

    return replace(record, **{f.name: pick(getattr(record, f.name)) for f in fields(record)})


def _on(record: Any, device: torch.device) -> Any:
    if isinstance(record, Tensor):
        return record.to(device)
    if is_dataclass(record) and not isinstance(record, type):
        return replace(record, **{f.name: _on(getattr(record, f.name), device) for f in fields(record)})
    return record


@dataclass
class Minibatch:
    """What one ``training_step`` receives."""

    experience: Experience
    collected: Experience | None  # the whole collected batch, on the first of its minibatches; None on the others

    def to(self, device: torch.device) -> "Minibatch":
        """The same on a device, which only experience from a checkpoint is not on yet. Lightning calls it."""
        if self.experience.mask_BT.device == device:
            return self
        collected = None if self.collected is None else _on(self.collected, device)
        return Minibatch(_on(self.experience, device), collected)


@dataclass
class Evaluation:
    """What one ``validation_step``, ``test_step`` or ``predict_step`` returns.

    It has no rows where prompts do not divide over the processes and this one has none left.
    """

    responses: Responses
    rewards: RewardTable
    kl_B: Tensor  # sum over the response of log pi/pi_ref, in nats

    def counted(self, batch: PromptBatch) -> "Evaluation":
        """What counts of it: everything, or, of a batch that stands in, no row."""
        if not batch.stands_in:
            return self
        none = torch.arange(0, device=self.kl_B.device)
        return Evaluation(_select_rows(self.responses, none), _select_rows(self.rewards, none), self.kl_B[none])


@dataclass
class StepOutput:
    """What ``training_step`` shows to callbacks, beside the loss. All detached; N counts trained objectives."""

    names: tuple[str, ...]
    weights_N: Tensor  # given by the combiner, averaged over the tokens
    score_BT: Tensor  # the one signal that was trained on
    terms: dict[str, Tensor]  # scalars of the loss: policy_loss, value_loss/<name>, entropy, clip_ratio, approx_kl, …
    minibatch: Minibatch
    seconds: float  # forward pass and combination; the backward pass is not in it
