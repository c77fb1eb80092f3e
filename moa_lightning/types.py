"""The records that sources, combiners, losses, module and callbacks exchange.

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
    """Encoded prompts, with the other columns of their rows."""

    prompts: list[str]  # chat template applied
    given: list[Prompt]  # as in the data
    columns: Columns
    input_ids_BP: Tensor  # int64, left-padded
    attention_mask_BP: Tensor  # int64, 0 on padding
    is_placeholder: bool = False  # only keeps this process in step with the others; excluded from all results

    def to(self, device: torch.device) -> "PromptBatch":
        """Move to a device. Lightning calls it."""
        return replace(
            self, input_ids_BP=self.input_ids_BP.to(device), attention_mask_BP=self.attention_mask_BP.to(device)
        )


@dataclass
class Responses:
    """Prompts with their responses."""

    input_ids_BL: Tensor
    attention_mask_BL: Tensor
    mask_BT: Tensor  # bool, True on response tokens, including the end-of-sequence token
    truncated_B: Tensor  # bool, whether the response has no end-of-sequence token
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
    """Scores of B responses under every objective of the panel, including eval-only ones.

    NaN marks a response that an objective could not score.
    """

    names: tuple[str, ...]
    trained: tuple[bool, ...]  # False for eval-only objectives
    raw_BN: Tensor  # float32, as the reward returned it
    value_BN: Tensor  # float32, after the objective's affine transform and clip
    transforms: tuple[str, ...] = ()  # formulas of the values in terms of the raw scores; empty if they are equal

    @property
    def transform_by_name(self) -> dict[str, str]:
        """``transforms`` of the objectives whose value differs from the raw score."""
        return {name: words for name, words in zip(self.names, self.transforms, strict=False) if words}

    @property
    def trained_names(self) -> tuple[str, ...]:
        """Names of the trained objectives, in order."""
        return tuple(n for n, t in zip(self.names, self.trained, strict=True) if t)

    @property
    def trained_BN(self) -> Tensor:
        """``value_BN`` of the trained objectives only."""
        return self.value_BN[:, list(self.trained)]

    @property
    def valid_BN(self) -> Tensor:
        """Bool: which responses the trained objectives could score."""
        return torch.isfinite(self.trained_BN)


@dataclass(frozen=True)
class Statistics:
    """One objective over one evaluation, over all processes, responses without a score left out.

    ``mean``, ``std`` and ``std_error`` are of its values: after scale, shift and clip, the unit of training and of
    thresholds.
    """

    mean: float
    std: float  # of the responses
    std_error: float  # of the mean; NaN with fewer than two responses
    count: int
    raw_mean: float  # of the scores as the reward gave them
    raw_std_error: float
    transform: str = ""  # how values follow from raw scores, in words; empty where they are the same

    @classmethod
    def by_name(cls, table: RewardTable, moments_2N: tuple[Tensor, Tensor, Tensor]) -> "dict[str, Statistics]":
        """Of each objective of a table, from count, mean and standard deviation of its values and then raw scores."""
        count_2N, mean_2N, std_2N = moments_2N
        error_2N = (std_2N / count_2N.sqrt()).where(count_2N > 1, torch.nan)
        count, mean, std, error = (moment_2N.tolist() for moment_2N in (count_2N, mean_2N, std_2N, error_2N))
        n = len(table.names)
        transforms = table.transform_by_name
        return {
            name: cls(mean[i], std[i], error[i], int(count[i]), mean[n + i], error[n + i], transforms.get(name, ""))
            for i, name in enumerate(table.names)
        }


@dataclass(kw_only=True)
class Experience(Signals):
    """A collected batch, or some rows of it, with everything that its updates need. N counts trained objectives.

    Its ``scores_BN`` are those of ``rewards`` minus the penalty, 0 where invalid, whatever is passed for them.
    """

    responses: Responses
    rewards: RewardTable
    advantages_BTN: Tensor
    behaviour_logprobs_BT: Tensor  # of the policy that sampled, at the sampling temperature
    reference_logprobs_BT: Tensor
    returns_BTN: Tensor | None  # targets of the value heads; None without critics
    values_BTN: Tensor | None
    tokens_per_row: float  # trained tokens per row of the full collected batch, over all ranks: the loss's divisor
    row_share: float = 1.0  # mean rows per process of the collected batch, divided by this process's rows
    log_policy_B: Tensor | None = None  # as log_prior_B, under the policy; None: no policy weights, so no policy values
    moving_BN: Tensor | None = None  # bool, wins are against the policy's own current responses; None: nowhere
    sequences: int = 0  # rows of the full collected batch, over all processes
    tokens: float = 0.0  # of its responses, over all processes
    kl: float | None = None  # mean over its rows of log pi/pi_ref per response, in nats; None: not measured
    kl_coefficient: float | None = None  # of the KL penalty in its rewards; None: no such penalty
    seconds: dict[str, float] = field(default_factory=dict)  # generation, scoring, forward
    metrics: dict[str, float] = field(default_factory=dict)  # further scalars, for logging only (prior_ess, …)

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
        """Divisor for a sum over rows, so that the mean of the processes' losses is the mean over all rows."""
        return max(len(self) * self.row_share, 1e-8)

    def select(self, rows: Tensor) -> "Experience":
        """Select rows, in the given order."""
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
    """The batch of one ``training_step``."""

    experience: Experience
    collected: Experience | None  # the full collected batch, on the first of its minibatches; None on the others

    def to(self, device: torch.device) -> "Minibatch":
        """Move to a device; only experience from a checkpoint is not there yet. Lightning calls it."""
        if self.experience.mask_BT.device == device:
            return self
        collected = None if self.collected is None else _on(self.collected, device)
        return Minibatch(_on(self.experience, device), collected)


@dataclass
class Evaluation:
    """The output of one ``validation_step``, ``test_step`` or ``predict_step``.

    It has no rows for a placeholder batch, which a process gets when it has run out of prompts before the others.
    """

    responses: Responses
    rewards: RewardTable
    kl_B: Tensor  # sum over the response of log pi/pi_ref, in nats

    def counted(self, batch: PromptBatch) -> "Evaluation":
        """Drop the rows of a placeholder batch; keep all rows of other batches."""
        if not batch.is_placeholder:
            return self
        none = torch.arange(0, device=self.kl_B.device)
        return Evaluation(_select_rows(self.responses, none), _select_rows(self.rewards, none), self.kl_B[none])


@dataclass
class StepOutput:
    """What ``training_step`` returns to callbacks besides the loss. All detached; N counts trained objectives."""

    names: tuple[str, ...]
    weights_N: Tensor  # the combiner's, averaged over the tokens
    score_BT: Tensor  # the combined signal that was trained on
    terms: dict[str, Tensor]  # scalars of the loss: policy_loss, value_loss/<name>, entropy, clip_ratio, approx_kl, …
    minibatch: Minibatch
    seconds: float  # of the forward pass and the combination, without the backward pass
