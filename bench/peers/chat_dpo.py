"""Losses of TRL's ``DPOTrainer`` on chat data whose turns end with another token than the tokenizer's.

In an environment of its own, from the top of the repository, with the versions of ``constraints.txt``::

    pip install torch==2.13.0
    pip install trl==1.16.0 -c constraints.txt
    python -m bench.peers.chat_dpo

It prints the numbers that ``tests/sources/test_chat.py`` holds this package to. Both build policy, reference, tokenizer
and rows with the functions below, which import neither of the two trainers.
"""

import math
import tempfile
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEMPLATES = {
    # In the manner of Phi and ChatML: a newline behind each turn, which is trained.
    "newline": (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    ),
    # In that of Llama 3: nothing behind the end of a turn, and the text without white space around it.
    "bare": (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    ),
}
LOSS_TYPES = ("sigmoid", "ipo", "sigmoid_norm")
BETA = 0.3
ROWS: list[dict[str, Any]] = [
    {"prompt": [{"role": "user", "content": "the film was"}], "answers": ["good and fine", "very very bad"]},
    {
        "prompt": [
            {"role": "user", "content": "the plot"},
            {"role": "assistant", "content": "dull"},
            {"role": "user", "content": "and the film"},
        ],
        "answers": ["long", " short and good "],
    },
    {"prompt": [{"role": "user", "content": "dull"}], "answers": ["fine film .", "bad"]},
]
"""Prompts with the chosen and the rejected answer."""

_WORDS = ["\n", "the", "film", "was", "good", "bad", "long", "short", "and", "very", "dull", "fine", "plot", "."]
_SPECIAL = ["<pad>", "<eos>", "<unk>", "<|user|>", "<|assistant|>", "<|end|>"]


def chat_tokenizer(template: str) -> PreTrainedTokenizerFast:
    """A word-level tokenizer that keeps newlines; its end token ``<eos>`` is in no template."""
    vocabulary = {token: i for i, token in enumerate([*_SPECIAL, *_WORDS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    split, spaces = pre_tokenizers.Split(Regex("\n"), "isolated"), pre_tokenizers.Split(Regex(" +"), "removed")
    core.pre_tokenizer = pre_tokenizers.Sequence([split, spaces])
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, extra_special_tokens=_SPECIAL[3:], **names)
    tokenizer.chat_template = TEMPLATES[template]
    return tokenizer


def chat_model(phase: float) -> LlamaForCausalLM:
    """A model of two layers whose weights are a formula, the same with every version of every library.

    Args:
        phase: another one, other weights.
    """
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64,
        vocab_size=len(_SPECIAL) + len(_WORDS), bos_token_id=1, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).float()
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            if parameter.ndim > 1:
                steps = torch.arange(parameter.numel(), dtype=torch.float64) * (1.7 + 0.1 * number)
                parameter.copy_((0.4 * torch.sin(steps + phase)).view_as(parameter))
    return model.eval()


def main() -> None:
    """Print the losses."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    def said(text: str) -> list[dict[str, str]]:
        return [{"role": "assistant", "content": text}]

    pairs = [
        {"prompt": row["prompt"], "chosen": said(row["answers"][0]), "rejected": said(row["answers"][1])}
        for row in ROWS
    ]
    for template in TEMPLATES:
        for loss_type in LOSS_TYPES:
            with tempfile.TemporaryDirectory() as folder:
                trainer = DPOTrainer(
                    model=chat_model(0.0),
                    ref_model=chat_model(math.pi / 5),
                    args=DPOConfig(
                        folder,
                        per_device_train_batch_size=len(ROWS),
                        beta=BETA,
                        loss_type=[loss_type],
                        use_cpu=True,
                        report_to="none",
                        bf16=False,
                        activation_checkpointing=False,
                        max_length=None,
                    ),
                    train_dataset=Dataset.from_list(pairs),
                    processing_class=chat_tokenizer(template),
                )
                batch = next(iter(trainer.get_train_dataloader()))
                trainer.model.eval()
                with torch.no_grad():
                    loss = float(trainer.compute_loss(trainer.model, batch))
                print(f"{template:8} {loss_type:13} {loss:.8f}")


if __name__ == "__main__":
    main()
