"""The supervised stage: build a small policy, or take one, and train it on text.

Legend: B sequences, L tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Sampler
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from moa_lightning.pretrained import open_pretrained, open_tokenizer
from moa_lightning.rows import load_rows, require_columns
from moa_lightning.stages.folders import refuse_used, whole_folder


@dataclass
class NewModel:
    """A policy from scratch, with a tokenizer trained on the text.

    Args:
        model_type: any causal architecture of transformers, such as ``llama`` or ``gpt2``.
        vocab_size: of the byte-level BPE tokenizer.
        config: fields of the architecture's config (``hidden_size``, ``num_hidden_layers``, …).
    """

    model_type: str = "llama"
    vocab_size: int = 4000
    config: dict[str, Any] = field(default_factory=dict)


@dataclass
class Texts:
    """What to train on.

    Args:
        path: JSONL, JSON, CSV or Parquet file (``.gz`` too), or hub id.
        column: the text; the part that is learnt.
        prompt_column: text before it that is read but not learnt; ``None`` if there is none.
        split: of a data set on the hub.
        val_size: rows held out to measure the loss.
        limit: use the first rows only; ``None`` uses all.
    """

    path: str
    column: str = "text"
    prompt_column: str | None = None
    split: str | None = None
    val_size: int = 64
    limit: int | None = None


@dataclass
class Fitting:
    """How to train.

    Args:
        epochs: passes over the texts.
        max_steps: stop earlier, after this many updates; -1 does not.
        batch_size: texts per update.
        learning_rate: peak of the schedule (linear warm-up, linear decay to 0).
        warmup: share of the updates in which the learning rate rises.
        weight_decay: of AdamW.
        max_length: tokens kept of a text, from its start.
        seed: of initial weights and order.
        accelerator: Lightning's.
        precision: Lightning's.
    """

    epochs: int = 1
    max_steps: int = -1
    batch_size: int = 32
    learning_rate: float = 1e-3
    warmup: float = 0.05
    weight_decay: float = 0.01
    max_length: int = 512
    seed: int = 0
    accelerator: str = "auto"
    precision: str = "32-true"


def supervised(
    output: str,
    data: Texts,
    base: str | None = None,
    new: NewModel | None = None,
    fit: Fitting | None = None,
    overwrite: bool = False,
) -> None:
    """Train a policy on text and write it as a Hugging Face folder.

    Args:
        output: folder to write.
        data: what to train on.
        base: folder or hub id of a policy to start from.
        new: or a policy from scratch. One of the two.
        fit: how to train.
        overwrite: replace ``output`` if it holds something already.

    Raises:
        ValueError: neither or both of ``base`` and ``new``, an output in use, or data that cannot be used.
    """
    fit = fit or Fitting()
    if (base is None) == (new is None):
        raise ValueError("give either --base (a policy to start from) or --new (one from scratch)")
    refuse_used(output, overwrite)
    prompts, texts = _read(data)
    seed_everything(fit.seed, verbose=False)
    tokenizer: PreTrainedTokenizerBase
    if new is not None:
        tokenizer = train_tokenizer([p + t for p, t in zip(prompts, texts, strict=True)], new.vocab_size)
        model = build_model(new, tokenizer)
    else:
        assert base is not None
        tokenizer = open_tokenizer(base)
        model = open_pretrained(AutoModelForCausalLM, base, "causal language model")
    examples = [encode(tokenizer, p, t, fit.max_length) for p, t in zip(prompts, texts, strict=True)]
    held_out, rest = examples[: data.val_size], examples[data.val_size :]
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{type(model).__name__}: {parameters / 1e6:.2f} M parameters, {len(rest)} texts, {len(held_out)} held out")
    before, after = train(model, rest, held_out, int(tokenizer.pad_token_id or 0), fit)
    print(f"held-out loss {before:.3f} -> {after:.3f} nats per token")
    save(model, tokenizer, output, overwrite)
    print(f"policy written to {output}")


@dataclass(frozen=True)
class Example:
    """One text as tokens."""

    ids: list[int]
    learnt_from: int  # tokens before this index are read, not learnt


def encode(tokenizer: PreTrainedTokenizerBase, prompt: str, text: str, max_length: int) -> Example:
    """Tokens of a prompt and a text, with the end token behind it where there is room."""
    read = tokenizer(prompt)["input_ids"] if prompt else []
    learnt = tokenizer(text, add_special_tokens=not prompt)["input_ids"]
    ids = [*read, *learnt]
    if tokenizer.eos_token_id is not None and (not ids or ids[-1] != tokenizer.eos_token_id):
        ids.append(tokenizer.eos_token_id)
    return Example(ids[:max_length], max(len(read), 1))


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on the texts, with ``<pad>`` and ``<eos>``."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<eos>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def build_model(new: NewModel, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A freshly initialised model for the tokenizer.

    Raises:
        ValueError: the architecture or one of its fields is unknown.
    """
    ends = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    try:
        config = AutoConfig.for_model(new.model_type)
    except ValueError as error:
        raise ValueError(f"new.model_type '{new.model_type}' is no architecture of transformers") from error
    unknown = sorted(name for name in new.config if not hasattr(config, name))
    if unknown:
        raise ValueError(f"new.config: a {new.model_type} config has no field {', '.join(unknown)}")
    config = AutoConfig.for_model(new.model_type, **{"vocab_size": len(tokenizer), **ends, **new.config})
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    model.generation_config = GenerationConfig(
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, do_sample=True
    )
    return model


def train(
    model: PreTrainedModel, examples: Sequence[Example], held_out: Sequence[Example], pad_id: int, fit: Fitting
) -> tuple[float, float]:
    """Fit the model in place; held-out loss before and after, in nats per learnt token (NaN without held-out texts)."""

    def collate(batch: Sequence[Example]) -> dict[str, Tensor]:
        return collate_examples(batch, pad_id)

    module = NextToken(model, fit)
    loader: DataLoader[Any] = DataLoader(
        examples,  # type: ignore[arg-type]  # a sequence is a map-style data set
        batch_sampler=SimilarLengths([len(e.ids) for e in examples], fit.batch_size, fit.seed),
        collate_fn=collate,
    )
    trainer = Trainer(
        max_epochs=fit.epochs,
        max_steps=fit.max_steps,
        accelerator=fit.accelerator,
        devices=1,
        precision=fit.precision,  # type: ignore[arg-type]  # Lightning checks the text
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    batches = [collate(held_out[i : i + fit.batch_size]) for i in range(0, len(held_out), fit.batch_size)]
    before = _mean_loss(module, batches)
    module.train()  # a loaded model comes in evaluation mode, and Lightning leaves it there
    trainer.fit(module, loader)
    return before, _mean_loss(module, batches)


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, output: str | Path, overwrite: bool) -> None:
    """Write model, tokenizer and generation config; the folder appears whole."""
    with whole_folder(output, overwrite) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


class NextToken(LightningModule):
    """Next-token prediction with AdamW, linear warm-up and linear decay.

    Args:
        model: trained in place.
        fit: how.
    """

    def __init__(self, model: PreTrainedModel, fit: Fitting) -> None:
        super().__init__()
        self.model, self.fit = model, fit

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Cross-entropy per learnt token, in nats."""
        logits_BLV = self.model(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
        return cross_entropy(logits_BLV[:, :-1].flatten(0, 1).float(), batch["labels"][:, 1:].flatten())

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy per learnt token."""
        loss = self.loss(batch)
        self.log("loss", loss, prog_bar=True, batch_size=len(batch["input_ids"]))
        return loss

    def configure_optimizers(self) -> Any:
        """AdamW; one schedule step per update."""
        optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=self.fit.learning_rate, weight_decay=self.fit.weight_decay
        )
        updates = max(int(self.trainer.estimated_stepping_batches), 1)
        rising = max(int(self.fit.warmup * updates), 1)

        def share(step: int) -> float:
            return min((step + 1) / rising, max(updates - step, 0) / max(updates - rising, 1))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class SimilarLengths(Sampler[list[int]]):
    """Batches of texts of similar length, in random order: little padding, all texts once an epoch.

    Args:
        lengths: of the texts.
        batch_size: texts per batch.
        seed: of the order.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0

    def __len__(self) -> int:
        """Batches per epoch."""
        return (len(self.lengths) + self.batch_size - 1) // self.batch_size

    def __iter__(self) -> Iterator[list[int]]:
        """Batches of one epoch."""
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        self.epoch += 1
        noise = torch.rand(len(self.lengths), generator=generator) * 8  # neighbours change from epoch to epoch
        order = sorted(range(len(self.lengths)), key=lambda i: self.lengths[i] + float(noise[i]))
        batches = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        yield from (batches[int(i)] for i in torch.randperm(len(batches), generator=generator))


def collate_examples(batch: Sequence[Example], pad_id: int) -> dict[str, Tensor]:
    """Right-padded ids, attention mask and labels (-100 where nothing is learnt)."""
    width = max(len(e.ids) for e in batch)
    ids_BL = torch.full((len(batch), width), pad_id)
    mask_BL, labels_BL = torch.zeros_like(ids_BL), torch.full_like(ids_BL, -100)
    for row, example in enumerate(batch):
        length = len(example.ids)
        ids_BL[row, :length] = torch.tensor(example.ids)
        mask_BL[row, :length] = 1
        labels_BL[row, example.learnt_from : length] = ids_BL[row, example.learnt_from : length]
    return {"input_ids": ids_BL, "attention_mask": mask_BL, "labels": labels_BL}


@torch.no_grad()
def _mean_loss(module: NextToken, batches: Sequence[dict[str, Tensor]]) -> float:
    module.eval()
    total = count = 0.0
    for batch in batches:
        learnt = int((batch["labels"][:, 1:] != -100).sum())
        inputs = {name: value.to(module.device) for name, value in batch.items()}
        total += float(module.loss(inputs)) * learnt
        count += learnt
    return total / count if count else float("nan")


def _read(data: Texts) -> tuple[list[str], list[str]]:
    rows = load_rows(data.path, data.split)
    require_columns(rows, [c for c in (data.column, data.prompt_column) if c], data.path)
    if data.limit is not None:
        rows = rows.select(range(min(data.limit, len(rows))))
    texts = [str(text) for text in rows[data.column]]
    prompts = [str(p) for p in rows[data.prompt_column]] if data.prompt_column else [""] * len(texts)
    if len(texts) <= data.val_size:
        raise ValueError(
            f"{data.path} has {len(texts)} rows, no more than the {data.val_size} to hold out; lower val_size"
        )
    return prompts, texts
