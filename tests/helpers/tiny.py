"""Small policies, tokenizers and batches that tests build for themselves."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)

WORDS = ["the", "film", "was", "good", "bad", "long", "short", "and", "very", "dull", "fine", "plot", "."]
VOCABULARY = {token: i for i, token in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}


def tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer over ``WORDS``."""
    core = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def gpt2_config(**changes: object) -> GPT2Config:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32, "vocab_size": len(VOCABULARY)}
    ends = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
    return GPT2Config(**{**sizes, **ends, **changes})


def llama_config(**changes: object) -> LlamaConfig:
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32,
        "vocab_size": len(VOCABULARY),
    }
    ends = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
    return LlamaConfig(**{**sizes, **ends, **changes})


def policy_folder(folder: Path, config: PretrainedConfig | None = None, seed: int = 0, scale: float = 3.0) -> Path:
    """A policy in Hugging Face format with random weights, ``scale`` times as peaked as freshly initialised ones."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config or gpt2_config())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(scale)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def padded_batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids (4, 5 + 6), attention mask and response mask: prompts left-padded, responses right-padded."""
    generator = torch.Generator().manual_seed(seed)
    ids_BL = torch.randint(2, len(VOCABULARY), (4, 11), generator=generator)
    attention_BL = torch.ones_like(ids_BL)
    for row, (prompt, response) in enumerate([(5, 6), (3, 2), (1, 4), (4, 1)]):
        attention_BL[row, : 5 - prompt] = 0
        attention_BL[row, 5 + response :] = 0
    return ids_BL.where(attention_BL.bool(), 0), attention_BL, attention_BL[:, 5:].bool()
