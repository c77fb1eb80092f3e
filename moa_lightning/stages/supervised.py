"""The supervised stage: train a new or existing policy on text.

Legend: B sequences, L tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import seed_everything
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from moa_lightning.chat import Prompt, TemplateError, answer_turn, closed_answer, is_chat, render
from moa_lightning.errors import UserError
from moa_lightning.stages.fitting import FittedModule, Fitting, SimilarLengths, run
from moa_lightning.utils.atomic_folder import atomic_folder, refuse_used
from moa_lightning.utils.console import library_bars, progress, shows_progress
from moa_lightning.utils.load_rows import load_rows, place, require_columns
from moa_lightning.utils.pretrained import open_pretrained, open_tokenizer


@dataclass(frozen=True)
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


@dataclass(frozen=True)
class Texts:
    """What to train on: texts, or chat messages ``{"role": …, "content": …}``.

    Of chat messages, the loss is on the last one, an assistant's, including the end of turn in the chat template of
    ``base``.

    Args:
        path: JSONL, JSON, CSV or Parquet file (``.gz`` too), or hub id.
        column: column of the text or messages to train on. Several columns give several texts per row.
        prompt_column: column of the text or messages before it, without loss; ``None`` if there is none.
        split: of a data set on the hub.
        val_size: rows held out to measure the loss.
        limit: use the first rows only; ``None`` uses all.
    """

    path: str
    column: str | list[str] = "text"
    prompt_column: str | None = None
    split: str | None = None
    val_size: int = 64
    limit: int | None = None


_FITTING = Fitting()


def supervised(
    output: str,
    data: Texts,
    base: str | None = None,
    new: NewModel | None = None,
    fit: Fitting = _FITTING,
    overwrite: bool = False,
) -> None:
    """Train a policy on text and write it as a Hugging Face folder.

    Args:
        output: folder to write.
        data: what to train on.
        base: folder or hub id of a policy to start from. Set either this or ``new``.
        new: a policy from scratch.
        fit: how to train.
        overwrite: replace ``output`` if it is not empty.

    Raises:
        UserError: neither or both of ``base`` and ``new`` are set, ``output`` is not empty, or the data cannot be used.
    """
    if (base is None) == (new is None):
        raise UserError("give either --base (a policy to start from) or --new (one from scratch)")
    refuse_used(output, overwrite)
    prompts, texts = _read(data)
    seed_everything(fit.seed, verbose=False)
    tokenizer: PreTrainedTokenizerBase
    if new is not None:
        plain = [p + t for p, t in zip(prompts, texts, strict=True) if isinstance(p, str)]
        if len(plain) < len(prompts):
            raise UserError(
                f"'{data.path}' holds chat messages, and a new tokenizer has no chat template; give --base with a chat "
                "model's folder or hub id, or texts"
            )
        tokenizer = train_tokenizer(plain, new.vocab_size)
        model = build_model(new, tokenizer)
    else:
        assert base is not None
        tokenizer = open_tokenizer(base)
        if not tokenizer.chat_template and not all(isinstance(prompt, str) for prompt in prompts):
            raise UserError(
                f"'{data.path}' holds chat messages, and the tokenizer of '{base}' has no chat template; give --base "
                "with a chat model's folder or hub id, or texts"
            )
        with library_bars():
            model = open_pretrained(AutoModelForCausalLM, base, "causal language model")
    examples = []
    for i, (prompt, text) in enumerate(progress(list(zip(prompts, texts, strict=True)), "tokens", "text")):
        try:
            examples.append(encode(tokenizer, prompt, text, fit.max_length))
        except TemplateError as error:
            columns = 1 if isinstance(data.column, str) else len(data.column)
            raise UserError(f"{place(data.path, i // columns)}: {error}; change or remove the row") from error
    held_out, rest = examples[: data.val_size], examples[data.val_size :]
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{type(model).__name__}: {parameters / 1e6:.2f} M parameters, {len(rest)} texts, {len(held_out)} held out")
    before, after = train(model, rest, held_out, int(tokenizer.pad_token_id or 0), fit)
    print(f"held-out loss {before:.3f} -> {after:.3f} nats per token")
    save(model, tokenizer, output, overwrite)
    print(f"policy written to {output}")


@dataclass(frozen=True)
class Example:
    """Token ids of a text."""

    ids: list[int]
    learnt_from: int  # tokens before this index have no loss


def encode(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, text: str, max_length: int) -> Example:
    """Encode a prompt and a text, followed by its end if there is room.

    The end is the tokenizer's end token, or after chat messages what the chat template writes there.
    """
    if not isinstance(prompt, str):
        read = tokenizer(render(tokenizer, prompt), add_special_tokens=False)["input_ids"]
        turn = answer_turn(tokenizer)
        if turn is not None:
            return Example([*read, *closed_answer(tokenizer, prompt, text, turn)][:max_length], max(len(read), 1))
        learnt = tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        read = tokenizer(prompt)["input_ids"] if prompt else []
        learnt = tokenizer(text, add_special_tokens=not prompt)["input_ids"]
    ids = [*read, *learnt]
    if tokenizer.eos_token_id is not None and (not ids or ids[-1] != tokenizer.eos_token_id):
        ids.append(tokenizer.eos_token_id)
    return Example(ids[:max_length], max(len(read), 1))


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with ``<pad>`` and ``<eos>`` on texts."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=shows_progress(),
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
    """Build a randomly initialised model for the tokenizer.

    Raises:
        UserError: the architecture or one of its fields is unknown.
    """
    ends = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    try:
        config = AutoConfig.for_model(new.model_type)
    except ValueError as error:
        raise UserError(f"new.model_type '{new.model_type}' is no architecture of transformers") from error
    unknown = sorted(name for name in new.config if not hasattr(config, name))
    if unknown:
        raise UserError(f"new.config: a {new.model_type} config has no field {', '.join(unknown)}")
    config = AutoConfig.for_model(new.model_type, **{"vocab_size": len(tokenizer), **ends, **new.config})
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    model.generation_config = GenerationConfig(
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, do_sample=True
    )
    return model


def train(
    model: PreTrainedModel, examples: Sequence[Example], held_out: Sequence[Example], pad_id: int, fit: Fitting
) -> tuple[float, float]:
    """Train the model in place. Returns the held-out loss before and after, in nats per token with loss.

    The losses are NaN without held-out texts.
    """

    def collate(batch: Sequence[Example]) -> dict[str, Tensor]:
        return collate_examples(batch, pad_id)

    module = NextToken(model, fit)
    loader: DataLoader[Any] = DataLoader(
        examples,  # type: ignore[arg-type]  # a sequence is a map-style data set
        batch_sampler=SimilarLengths([len(e.ids) for e in examples], fit.batch_size, fit.seed),
        collate_fn=collate,
    )
    batches = [collate(held_out[i : i + fit.batch_size]) for i in range(0, len(held_out), fit.batch_size)]
    before = _mean_loss(module, batches)
    run(module, loader)
    return before, _mean_loss(module, batches)


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, output: str | Path, overwrite: bool) -> None:
    """Write model, tokenizer and generation config to a folder, atomically."""
    with atomic_folder(output, overwrite) as folder, library_bars():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


class NextToken(FittedModule):
    """Trains a model by next-token prediction."""

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Mean cross-entropy of the tokens with loss, in nats."""
        logits_BLV = self.model(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
        return cross_entropy(logits_BLV[:, :-1].flatten(0, 1).float(), batch["labels"][:, 1:].flatten())


def collate_examples(batch: Sequence[Example], pad_id: int) -> dict[str, Tensor]:
    """Collate into right-padded ids, attention mask and labels (-100 on tokens without loss)."""
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
    for batch in progress(batches, "held-out loss", "batch"):
        learnt = int((batch["labels"][:, 1:] != -100).sum())
        inputs = {name: value.to(module.device) for name, value in batch.items()}
        total += float(module.loss(inputs)) * learnt
        count += learnt
    return total / count if count else float("nan")


def _read(data: Texts) -> tuple[list[Prompt], list[str]]:
    rows = load_rows(data.path, data.split)
    columns = [data.column] if isinstance(data.column, str) else data.column
    require_columns(rows, [*columns, *([data.prompt_column] if data.prompt_column else [])], data.path)
    if data.limit is not None:
        rows = rows.select(range(min(data.limit, len(rows))))
    prompts: list[Prompt] = []
    texts: list[str] = []
    for i, row in enumerate(rows):
        for column in columns:
            try:
                prompt, text = _read_and_learnt(row[data.prompt_column] if data.prompt_column else "", row[column])
            except UserError as error:
                raise UserError(f"{place(data.path, i)}: column '{column}': {error}") from error
            prompts.append(prompt)
            texts.append(text)
    if len(texts) <= data.val_size:
        raise UserError(
            f"{data.path} has {len(texts)} rows, no more than the {data.val_size} to hold out; lower val_size"
        )
    return prompts, texts


def _read_and_learnt(prompt: Any, text: Any) -> tuple[Prompt, str]:
    """Split a row into the prompt and the text to train on; of messages, the last one."""
    before = prompt if isinstance(prompt, list) else []
    if not isinstance(text, list):
        if not before:
            return str(prompt), str(text)
        text = [{"role": "assistant", "content": str(text)}]
    if not isinstance(prompt, list) and prompt:
        raise UserError("holds messages, but the prompt is text; both must be messages")
    messages = [*before, *text]
    if not is_chat(messages) or messages[-1]["role"] != "assistant" or len(messages) < 2:
        raise UserError(
            "must hold messages with 'role' and 'content' as text, the last one the assistant's, after at least one "
            "other"
        )
    # All rows of a file have the same fields, so a field that a message lacks is null.
    messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
    return messages[:-1], str(messages[-1]["content"])
