"""The implicit reward of a policy trained with DPO.

Legend: B sequences, L tokens.
"""

import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from moa_lightning.chat import Turn, answer_tokens, answer_turn
from moa_lightning.errors import UserError
from moa_lightning.rewards.with_model import RewardWithModel
from moa_lightning.utils.pretrained import open_pretrained, open_tokenizer


@dataclass
class ImplicitReward(RewardWithModel):
    """``beta (log pi(y|x) - log pi_ref(y|x))`` with pi a PEFT adapter and pi_ref the same model without it.

    An adapter that was trained with DPO on one objective's labels is a reward for that objective. MODPO's margins then
    need no other reward model.

    Source: Rafailov et al. 2023, arXiv 2305.18290, eq. 5 without its partition function, which cancels between the
    responses to a prompt; Zhou et al. 2023, arXiv 2310.03708.

    Args:
        path: folder or hub id of the adapter, with its tokenizer.
        beta: the one that the adapter was trained with.
        batch_size: texts per forward pass; changes speed and memory, not scores.
        dtype: of the weights; ``auto`` is the checkpoint's. Scores are float32.
        trust_remote_code: run code that comes with the checkpoint.
        revision: branch, tag or commit on the hub.
    """

    path: str
    beta: float = 0.1
    batch_size: int = 8
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    trust_remote_code: bool = False
    revision: str | None = None
    _tokenizer: Any = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Validate hyperparameters."""
        if not 0 < self.beta < math.inf:
            raise UserError(f"ImplicitReward.beta must be a finite number above 0, got {self.beta}")
        if self.batch_size < 1:
            raise UserError(f"ImplicitReward.batch_size must be at least 1, got {self.batch_size}")

    def check(self, columns: set[str]) -> None:
        """Load the adapter's config and its tokenizer, but no weights."""
        from peft import PeftConfig

        if self._tokenizer is not None:
            return
        folder = Path(self.path).expanduser()
        if folder.is_dir() and not (folder / "adapter_config.json").is_file():
            raise UserError(
                f"'{self.path}' holds no adapter (adapter_config.json); ImplicitReward compares a model "
                "with and without its adapter"
            )
        open_pretrained(PeftConfig, self.path, "PEFT adapter", revision=self.revision)
        self._tokenizer = open_tokenizer(self.path, **self._arguments())

    def _load(self) -> nn.Module:
        from peft import AutoPeftModelForCausalLM

        model: nn.Module = open_pretrained(
            AutoPeftModelForCausalLM, self.path, "PEFT adapter", dtype=self.dtype, **self._arguments()
        )
        return model

    def _sharded_module(self) -> nn.Module:
        model: nn.Module = self._model.base_model.model  # without the wrappers of peft
        return model

    def score(self, prompts: list[str], completions: list[str], **columns: list[Any]) -> list[float | None]:
        """Score completions, in their order."""
        if self._model is None:
            self.setup(torch.device("cpu"))
        texts = [self._tokens(p, c) for p, c in zip(prompts, completions, strict=True)]
        return self._in_batches(
            [len(ids) for ids, _ in texts],
            lambda rows: self._score_batch([texts[i] for i in rows]),
            lambda: self._score_batch([([0, 0], 1)]),
        )

    @cached_property
    def _turn(self) -> Turn | None:
        return answer_turn(self._tokenizer)

    def _tokens(self, prompt: str, completion: str) -> tuple[list[int], int]:
        """Token ids of prompt and completion, with an end token as in training, and the number of prompt tokens."""
        if self._turn is not None and self._turn.starts_answer(prompt):
            read: list[int] = self._tokenizer(prompt, add_special_tokens=False)["input_ids"]
            return [*read, *answer_tokens(self._tokenizer, prompt, completion, self._turn)], len(read)
        bos = self._tokenizer.bos_token  # a chat template has written its own
        ids: list[int] = self._tokenizer(prompt, add_special_tokens=not (bos and prompt.startswith(bos)))["input_ids"]
        end = self._tokenizer.eos_token_id
        while ids and ids[-1] == end:  # some tokenizers append an end token to every text
            ids.pop()
        answer = self._tokenizer(completion, add_special_tokens=False)["input_ids"]
        return [*ids, *answer, *([] if end is None else [end])], len(ids)

    def _score_batch(self, texts: list[tuple[list[int], int]]) -> list[float]:
        device = self._device
        width = max(len(ids) for ids, _ in texts)
        ids_BL = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in texts], device=device)
        real_BL = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in texts], device=device)
        answer_BL = torch.tensor(
            [[0] * start + [1] * (len(ids) - start) + [0] * (width - len(ids)) for ids, start in texts], device=device
        )

        def total() -> torch.Tensor:
            logits_BLV = self._model(input_ids=ids_BL, attention_mask=real_BL).logits[:, :-1].float()
            chosen_BL = logits_BLV.log_softmax(-1).gather(-1, ids_BL[:, 1:].unsqueeze(-1)).squeeze(-1)
            total_B: torch.Tensor = (chosen_BL * answer_BL[:, 1:]).sum(1)
            return total_B

        # Training runs under the Trainer's precision; the reward must not depend on it.
        with torch.autocast(device.type, enabled=False):
            with_adapter_B = total()
            with self._model.disable_adapter():
                without_B = total()
        scores: list[float] = (self.beta * (with_adapter_B - without_B)).tolist()
        return scores

    def _arguments(self) -> dict[str, Any]:
        return {"trust_remote_code": self.trust_remote_code, "revision": self.revision}
