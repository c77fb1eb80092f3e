"""Rewards from sequence classifiers.

Legend: B texts, K labels, L tokens.
"""

import difflib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from moa_lightning.errors import UserError
from moa_lightning.rewards.scored_text import PromptAndCompletion, ScoredText
from moa_lightning.rewards.with_model import RewardWithModel
from moa_lightning.utils.pretrained import open_pretrained, open_tokenizer

_LARGEST_REAL_LENGTH = 10**6  # tokenizers without a limit have 10**30


class ClassifierOutput(ABC):
    """How a classifier's logits become scores."""

    @abstractmethod
    def of(self, logits_BK: Tensor, label: int, independent: bool) -> Tensor:
        """Compute the scores (B,) of one label.

        Args:
            logits_BK: float32.
            label: its index in K.
            independent: whether each label has its own probability (a single label, or a multi-label model).
        """


@dataclass(frozen=True)
class Logit(ClassifierOutput):
    """The raw logit, which is unbounded and does not saturate."""

    @override
    def of(self, logits_BK: Tensor, label: int, independent: bool) -> Tensor:
        return logits_BK[:, label]


@dataclass(frozen=True)
class Probability(ClassifierOutput):
    """The probability, in [0, 1]: softmax over the labels; sigmoid for a single label and for multi-label models."""

    @override
    def of(self, logits_BK: Tensor, label: int, independent: bool) -> Tensor:
        return logits_BK[:, label].sigmoid() if independent else logits_BK.softmax(-1)[:, label]


@dataclass
class TextClassifier(RewardWithModel):
    """Any ``AutoModelForSequenceClassification`` with its own tokenizer: sentiment, toxicity, a reward model.

    The model is frozen and in evaluation mode. It computes in its own ``dtype``, whatever the Trainer's precision, and
    checkpoints do not hold it. Each process has a copy, or its shards if the strategy shards models.

    A text without tokens (an empty completion, with some tokenizers) has no score.

    Args:
        path: folder or hub id of model and tokenizer.
        label: the label to score, by name or index; may be omitted if there is only one.
        output: ``Logit``, or ``Probability``.
        text: the text to score: ``PromptAndCompletion``, ``CompletionOnly``, ``TextPair`` or ``Chat``.
        batch_size: texts per forward pass; changes speed and memory, not scores.
        max_length: in tokens; longer texts are truncated at their start. ``None`` is the model's own limit.
        dtype: of the weights; ``auto`` is the checkpoint's. Scores are float32.
        trust_remote_code: run code that comes with the checkpoint.
        revision: branch, tag or commit on the hub.
    """

    path: str
    label: int | str | None = None
    output: ClassifierOutput = field(default_factory=Logit)
    text: ScoredText = field(default_factory=PromptAndCompletion)
    batch_size: int = 32
    max_length: int | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    trust_remote_code: bool = False
    revision: str | None = None
    _config: Any = field(default=None, init=False, repr=False, compare=False)
    _tokenizer: Any = field(default=None, init=False, repr=False, compare=False)
    _label: int = field(default=0, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Validate hyperparameters."""
        if self.batch_size < 1:
            raise UserError(f"TextClassifier.batch_size must be at least 1, got {self.batch_size}")
        if self.max_length is not None and self.max_length < 1:
            raise UserError(f"TextClassifier.max_length must be at least 1 (or null), got {self.max_length}")

    @property
    def label_name(self) -> str:
        """Name of the label in the model's config; available after :meth:`check` or :meth:`setup`."""
        return self._labels()[self._label]

    def check(self, columns: set[str]) -> None:
        """Load config and tokenizer, but no weights, and check the label and lengths against them.

        Raises:
            UserError: the folder does not exist or does not open, or the model has no such label, or its limit is less
                than ``max_length`` tokens.
        """
        from transformers import AutoConfig

        if self._tokenizer is not None:
            return
        self._config = open_pretrained(AutoConfig, self.path, "model config", **self._arguments())
        self._label = self._find_label(self._labels())
        tokenizer = open_tokenizer(self.path, **self._arguments())
        self.text.check(tokenizer)
        limit = self._limit(tokenizer)
        if self.max_length is not None and limit is not None and self.max_length > limit:
            raise UserError(
                f"max_length {self.max_length} exceeds the {limit} tokens that '{self.path}' reads; lower it or "
                "leave it out"
            )
        special = tokenizer.num_special_tokens_to_add(pair=True)
        if self.max_length is not None and self.max_length <= special:
            raise UserError(
                f"max_length {self.max_length} leaves no room for text: its tokenizer adds up to {special} of its own"
            )
        tokenizer.truncation_side = "left"  # the completion, which is scored, is at the end
        self._tokenizer = tokenizer

    def _load(self) -> nn.Module:
        from transformers import AutoModelForSequenceClassification

        model: nn.Module
        model, report = open_pretrained(
            AutoModelForSequenceClassification,
            self.path,
            "sequence classifier",
            dtype=self.dtype,
            output_loading_info=True,
            **self._arguments(),
        )
        missing = sorted(report["missing_keys"])
        if missing:  # transformers would initialise them randomly
            raise UserError(
                f"'{self.path}' is not a trained sequence classifier: it has no weights for {', '.join(missing[:3])}"
            )
        return model

    def score(self, prompts: list[str], completions: list[str], **columns: list[Any]) -> list[float | None]:
        """Score completions, in their order."""
        if self._model is None:
            self.setup(torch.device("cpu"))
        encoded = self._encode(prompts, completions) if completions else {"input_ids": []}

        def score(rows: list[int]) -> list[float]:
            return self._score_batch({name: [values[i] for i in rows] for name, values in encoded.items()})

        def placeholder_pass() -> object:
            return self._score_batch({"input_ids": [[0]], "attention_mask": [[1]]})

        return self._in_batches([len(ids) for ids in encoded["input_ids"]], score, placeholder_pass)

    def _encode(self, prompts: list[str], completions: list[str]) -> Any:
        limit = self.max_length or self._limit(self._tokenizer)
        return self.text.encode(
            self._tokenizer, prompts, completions, truncation=limit is not None, max_length=limit, padding=False
        )

    def _score_batch(self, inputs: dict[str, list[list[int]]]) -> list[float]:
        device = self._device
        padding = self._padding_id(inputs["input_ids"])
        self._model.config.get_text_config().pad_token_id = padding
        # Pad on the right, whatever the tokenizer does: with absolute positions a text must start at position 0.
        width = max(len(ids) for ids in inputs["input_ids"])
        inputs_BL = {
            name: torch.tensor(
                [row + [padding if name == "input_ids" else 0] * (width - len(row)) for row in rows], device=device
            )
            for name, rows in inputs.items()
        }
        # Rollouts run under the Trainer's precision; the reward must not depend on it.
        with torch.autocast(device.type, enabled=False):
            logits_BK = self._model(**inputs_BL).logits.float()
        independent = logits_BK.shape[1] == 1 or self._config.problem_type == "multi_label_classification"
        scores: list[float] = self.output.of(logits_BK, self._label, independent).tolist()
        return scores

    def _arguments(self) -> dict[str, Any]:
        return {"trust_remote_code": self.trust_remote_code, "revision": self.revision}

    def _labels(self) -> list[str]:
        return [str(self._config.id2label[i]) for i in sorted(self._config.id2label)]

    def _find_label(self, labels: Sequence[str]) -> int:
        known = ", ".join(f"{i}: {name}" for i, name in enumerate(labels))
        if self.label is None:
            if len(labels) == 1:
                return 0
            raise UserError(f"'{self.path}' has several labels; set label to one of them ({known})")
        if self.label in labels:
            return labels.index(str(self.label))
        # The command line cannot tell the index 1 from the text "1".
        if str(self.label).isdecimal() and int(self.label) < len(labels):
            return int(self.label)
        near = difflib.get_close_matches(str(self.label).lower(), [name.lower() for name in labels], n=1)
        hint = next((f"; did you mean '{name}'?" for name in labels if [name.lower()] == near), "")
        raise UserError(f"'{self.path}' has no label '{self.label}'; its labels are {known}{hint}")

    def _padding_id(self, texts: list[list[int]]) -> int:
        """The tokenizer's padding token, or the model's, or any token that ends none of these texts.

        Attention ignores padding whatever its id. But decoder classifiers find a text's last token by the padding id.
        If that is the end token, as is common, they miss the end token of a text that ends with it.
        """
        declared = (self._tokenizer.pad_token_id, getattr(self._config.get_text_config(), "pad_token_id", None))
        last = {ids[-1] for ids in texts}
        free = (i for i in range(len(self._tokenizer)) if i not in last)
        return next((int(i) for i in declared if i is not None), next(free, 0))

    def _limit(self, tokenizer: Any) -> int | None:
        """Maximum number of tokens that the model can read; ``None`` without a limit."""
        positions = getattr(self._config.get_text_config(), "max_position_embeddings", None)
        limits = [n for n in (tokenizer.model_max_length, positions) if n is not None and 0 < n < _LARGEST_REAL_LENGTH]
        return int(min(limits)) if limits else None
