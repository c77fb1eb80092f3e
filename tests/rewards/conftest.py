"""Tiny classifiers and tokenizers, saved as Hugging Face folders."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)

WORDS = ["good", "bad", "film", "the", "a", "was", "plot", "slow", "fine", "dull"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "<eos>"]
CONTEXT = 24

Folder = Callable[..., Path]


def make_tokenizer(special: dict[str, str], frame: bool) -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(SPECIAL + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if frame:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", **special)


def spread_weights(model: torch.nn.Module) -> torch.nn.Module:
    """Weights large enough for texts to get clearly different scores."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    return model


def sizes(config_class: type[PretrainedConfig]) -> dict[str, int]:
    if config_class is GPT2Config:
        return {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": CONTEXT}
    return {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": CONTEXT,
    }


@pytest.fixture
def bert_folder(tmp_path: Path) -> Folder:
    """Saves a BERT classifier and its tokenizer; returns the folder."""

    def make(labels: tuple[str, ...] = ("NEGATIVE", "POSITIVE"), **changes: object) -> Path:
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=len(SPECIAL + WORDS),
            pad_token_id=0,
            num_labels=len(labels),
            id2label=dict(enumerate(labels)),
            label2id={label: i for i, label in enumerate(labels)},
            **{**sizes(BertConfig), **changes},
        )
        folder = tmp_path / f"bert-{len(labels)}"
        spread_weights(BertForSequenceClassification(config)).save_pretrained(folder)
        special = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
        make_tokenizer(special, frame=True).save_pretrained(folder)
        return folder

    return make


@pytest.fixture
def gpt2_folder(tmp_path: Path) -> Folder:
    """Saves a GPT-2 reward model, by default without a padding token and with one label; returns the folder."""

    def make(special: dict[str, str] | None = None, labels: int = 1, causal: bool = False, **changes: object) -> Path:
        torch.manual_seed(1)
        config = GPT2Config(
            vocab_size=len(SPECIAL + WORDS),
            bos_token_id=4,
            eos_token_id=4,
            num_labels=labels,
            **{**sizes(GPT2Config), **changes},
        )
        folder = tmp_path / "gpt2"
        model_class = GPT2LMHeadModel if causal else GPT2ForSequenceClassification
        spread_weights(model_class(config)).save_pretrained(folder)
        special = {"eos_token": "<eos>"} if special is None else special
        make_tokenizer(special, frame=False).save_pretrained(folder)
        return folder

    return make
