"""The reward model stage: train a sequence classifier on pairs of preferred and rejected texts.

Legend: B pairs, L tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import seed_everything
from torch import Tensor
from torch.nn.functional import logsigmoid
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from moa_lightning.errors import UserError
from moa_lightning.stages.fitting import FittedModule, Fitting, SimilarLengths, run
from moa_lightning.utils.atomic_folder import atomic_folder, refuse_used
from moa_lightning.utils.console import library_bars, progress
from moa_lightning.utils.load_rows import load_rows, require_columns
from moa_lightning.utils.pretrained import open_pretrained, open_tokenizer


@dataclass(frozen=True)
class Preferences:
    """Pairs of texts, one preferred to the other.

    Args:
        path: JSONL, JSON, CSV or Parquet file (``.gz`` too), or hub id.
        chosen: column of the preferred text: a full dialogue, or an answer if there is a ``prompt_column``.
        rejected: column of the other text.
        prompt_column: column of the text before both; ``None`` if they are full dialogues.
        split: of a data set on the hub.
        val_size: pairs held out to measure the accuracy.
        limit: use the first pairs only; ``None`` uses all.
    """

    path: str
    chosen: str = "chosen"
    rejected: str = "rejected"
    prompt_column: str | None = None
    split: str | None = None
    val_size: int = 128
    limit: int | None = None


@dataclass(frozen=True)
class RewardFitting(Fitting):
    """How to train a reward model. Texts longer than ``max_length`` are truncated at their start."""

    batch_size: int = 16
    learning_rate: float = 3e-4


_FITTING = RewardFitting()


def reward_model(
    output: str,
    data: Preferences,
    base: str,
    fit: RewardFitting = _FITTING,
    label: str = "reward",
    overwrite: bool = False,
) -> None:
    """Train a reward model on preferences and write it as a Hugging Face folder.

    The folder is an ``AutoModelForSequenceClassification`` with one label, for ``TextClassifier`` and other tools that
    use reward models. The loss is that of the Bradley-Terry model, ``-log sigmoid(r(chosen) - r(rejected))`` (Bai et
    al. 2022, arXiv 2204.05862, section 2.2).

    Args:
        output: folder to write.
        data: the pairs to train on.
        base: folder or hub id to start from: a causal language model, such as one from ``moa sft``, or a classifier.
        fit: how to train.
        label: name of the score in the model's config.
        overwrite: replace ``output`` if it is not empty.

    Raises:
        UserError: ``output`` is not empty, or ``base`` or the data cannot be used.
    """
    refuse_used(output, overwrite)
    pairs = _read(data)
    seed_everything(fit.seed, verbose=False)
    tokenizer, model = _open(base, label)
    limit = _shortest(fit.max_length, getattr(model.config.get_text_config(), "max_position_embeddings", None))
    tokenizer.truncation_side, tokenizer.model_max_length = "left", limit
    encoded = [Pair(*(_tokens(tokenizer, text, limit) for text in pair)) for pair in progress(pairs, "tokens", "pair")]
    held_out, rest = encoded[: data.val_size], encoded[data.val_size :]
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{type(model).__name__}: {parameters / 1e6:.2f} M parameters, {len(rest)} pairs, {len(held_out)} held out")
    before = accuracy(model, held_out, fit.batch_size)
    train(model, rest, fit)
    after = accuracy(model, held_out, fit.batch_size)
    if held_out:
        error = math.sqrt(max(after * (1 - after), 1 / len(held_out)) / len(held_out))
        print(f"held-out accuracy {before:.3f} -> {after:.3f} (standard error {error:.3f}, {len(held_out)} pairs)")
    with atomic_folder(output, overwrite) as folder, library_bars():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    print(f"reward model written to {output}")


@dataclass(frozen=True)
class Pair:
    """Token ids of the two texts."""

    chosen: list[int]
    rejected: list[int]


class BradleyTerry(FittedModule):
    """Bradley-Terry model of pairwise preferences: trains the chosen text to score above the rejected one."""

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """``-log sigmoid`` of the margin, in nats."""
        return -logsigmoid(margins(self.model, batch)).mean()


def margins(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """Score of each chosen text minus that of its rejected one; ``(B,)`` from a batch of 2 B texts."""
    scores_2B = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits.squeeze(-1).float()
    chosen_B, rejected_B = scores_2B.chunk(2)
    margins_B: Tensor = chosen_B - rejected_B
    return margins_B


def train(model: PreTrainedModel, pairs: Sequence[Pair], fit: Fitting) -> None:
    """Train the model in place."""
    lengths = [max(len(p.chosen), len(p.rejected)) for p in pairs]
    pad_id = _pad_id(model)
    loader: DataLoader[Any] = DataLoader(
        pairs,  # type: ignore[arg-type]  # a sequence is a map-style data set
        batch_sampler=SimilarLengths(lengths, fit.batch_size, fit.seed),
        collate_fn=lambda batch: collate(batch, pad_id),
    )
    run(BradleyTerry(model, fit), loader)


@torch.inference_mode()
def accuracy(model: PreTrainedModel, pairs: Sequence[Pair], batch_size: int) -> float:
    """Share of pairs whose chosen text scores higher; a tie counts half. NaN without pairs."""
    model.eval()
    right = 0.0
    for start in progress(range(0, len(pairs), batch_size), "held-out accuracy", "batch"):
        batch = collate(pairs[start : start + batch_size], _pad_id(model))
        margin_B = margins(model, {name: value.to(model.device) for name, value in batch.items()})
        right += float((margin_B > 0).sum() + 0.5 * (margin_B == 0).sum())
    return right / len(pairs) if pairs else math.nan


def collate(batch: Sequence[Pair], pad_id: int) -> dict[str, Tensor]:
    """Collate pairs into right-padded texts: all chosen ones, then all rejected ones."""
    texts = [p.chosen for p in batch] + [p.rejected for p in batch]
    width = max(len(ids) for ids in texts)
    return {
        "input_ids": torch.tensor([ids + [pad_id] * (width - len(ids)) for ids in texts]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in texts]),
    }


def _open(base: str, label: str) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    tokenizer: PreTrainedTokenizerBase = open_tokenizer(base)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise UserError(f"the tokenizer of '{base}' has neither a pad_token nor an eos_token; set one there")
        tokenizer.pad_token = tokenizer.eos_token
    config = open_pretrained(AutoConfig, base, "model config")
    config.num_labels, config.id2label, config.label2id = 1, {0: label}, {label: 0}
    config.get_text_config().pad_token_id = tokenizer.pad_token_id  # decoders find a text's last token by it
    with library_bars():
        model: PreTrainedModel = open_pretrained(
            AutoModelForSequenceClassification, base, "sequence classifier", config=config, dtype=torch.float32
        )
    return tokenizer, model


def _pad_id(model: PreTrainedModel) -> int:
    return int(model.config.get_text_config().pad_token_id)


def _shortest(*limits: int | None) -> int:
    return min(limit for limit in limits if limit is not None)


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str, limit: int) -> list[int]:
    ids: list[int] = tokenizer(text, truncation=True, max_length=limit)["input_ids"]
    return ids


def _read(data: Preferences) -> list[tuple[str, str]]:
    rows = load_rows(data.path, data.split)
    names = [data.chosen, data.rejected, *([data.prompt_column] if data.prompt_column else [])]
    require_columns(rows, names, data.path)
    if data.limit is not None:
        rows = rows.select(range(min(data.limit, len(rows))))
    pairs = []
    for number, row in enumerate(rows, start=1):
        for name in names:
            if not isinstance(row[name], str) or (name != data.prompt_column and not row[name].strip()):
                raise UserError(f"'{data.path}' row {number}: column '{name}' holds no text")
        before = row[data.prompt_column] if data.prompt_column else ""
        pairs.append((before + row[data.chosen], before + row[data.rejected]))
    if len(pairs) <= data.val_size:
        raise UserError(
            f"'{data.path}' has {len(pairs)} pairs, no more than the {data.val_size} to hold out; lower data.val_size"
        )
    return pairs
