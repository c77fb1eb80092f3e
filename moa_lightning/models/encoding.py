"""Text to tokens and back.

Legend: B sequences, P prompt tokens, T response tokens, L = P + T.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moa_lightning.chat import Prompt, TemplateError, Turn, answer_turn, closed_answer, render
from moa_lightning.errors import UserError
from moa_lightning.types import PromptBatch, Responses

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = dict[str, Any]


@dataclass(frozen=True)
class Encoder:
    """Turns rows into prompts, and generated tokens into responses.

    A given response to a text prompt ends with the tokenizer's end token. A given response to chat messages ends as the
    chat template ends a turn, if the template has an end-of-turn token.

    Args:
        tokenizer: pads on the left.
        end_ids: tokens that end a response.
        context_length: of the policy, in tokens; ``None`` if it has no limit.
        max_new_tokens: tokens of the context that a prompt must leave free.
        max_prompt_length: keep only this many last tokens of a prompt; ``None`` refuses prompts that are too long.
        with_candidates: rows hold ``responses``, which must fit too; ``max_new_tokens`` limits their length.
    """

    tokenizer: "PreTrainedTokenizerBase"
    end_ids: tuple[int, ...]
    context_length: int | None
    max_new_tokens: int
    max_prompt_length: int | None = None
    with_candidates: bool = False

    def __post_init__(self) -> None:
        """Validate the lengths against the context."""
        longest = (self.max_prompt_length or 1) + self.max_new_tokens
        if self.context_length is not None and longest > self.context_length:
            raise UserError(
                f"max_prompt_length {self.max_prompt_length} and max_new_tokens {self.max_new_tokens} do not fit the "
                f"policy's context of {self.context_length} tokens; lower one of them"
            )

    @cached_property
    def turn(self) -> Turn | None:
        """What the chat template writes around an answer; ``None`` if it has no end-of-turn token."""
        return answer_turn(self.tokenizer)

    def render(self, prompt: Prompt) -> str:
        """The prompt's text for the policy: unchanged text, or chat messages formatted with the chat template."""
        if isinstance(prompt, str):
            return prompt
        if self.tokenizer.chat_template is None:
            raise UserError(
                "the prompts are chat messages, but the policy's tokenizer has no chat template; set "
                "policy.chat_template, or give prompts as text"
            )
        return render(self.tokenizer, prompt)

    def tokens(self, prompt: Prompt) -> list[int]:
        """Token ids of one prompt. A template writes its own special tokens; plain text gets the tokenizer's."""
        special = isinstance(prompt, str)
        ids: list[int] = self.tokenizer(self.render(prompt), add_special_tokens=special)["input_ids"]
        # Some tokenizers append an end token to every text; a prompt must not end with one.
        while ids and ids[-1] == self.tokenizer.eos_token_id and special:
            ids.pop()
        return ids[-self.max_prompt_length :] if self.max_prompt_length else ids

    def problem(self, row: Row) -> str | None:
        """Why the policy cannot read a row, and what to do about it; ``None`` if it can."""
        try:
            return self._problem(row)
        except TemplateError as error:
            return f"{error}; change or remove the row"

    def _problem(self, row: Row) -> str | None:
        length = len(self.tokens(row["prompt"]))
        start = " ".join(self.render(row["prompt"]).split())[:40]
        if length == 0:
            return "the prompt has no tokens; remove the row"
        room = self.max_new_tokens
        if self.with_candidates:
            encoded = [self.response_tokens(row["prompt"], response) for response in row["responses"]]
            lengths = [len(ids) for ids in encoded]
            for i, tokens in enumerate(lengths):
                if encoded[i] in encoded[:i]:
                    return (
                        f"responses {encoded.index(encoded[i])} and {i} have the same tokens, so the policy cannot "
                        "tell them apart; remove the row"
                    )
                if tokens <= 1 or encoded[i][0] in self.end_ids:
                    return f"response {i} has no tokens; remove the row"
                if tokens > self.max_new_tokens:
                    limit = f"source.max_response_length {self.max_new_tokens}; raise that, or"
                    if self.context_length is not None and self.max_new_tokens >= self.context_length - 1:
                        limit = f"the policy's context of {self.context_length} has room for;"
                    return f"response {i} has {tokens} tokens with its end token, more than {limit} remove the row"
            room = max(lengths)
        if self.context_length is not None and length + room > self.context_length:
            what = f"the longest response's {room}" if self.with_candidates else f"max_new_tokens {room}"
            advice = "Remove the row" if self.with_candidates else "Lower it, remove the row"
            return (
                f"the prompt has {length} tokens; with {what} it exceeds the policy's context of "
                f"{self.context_length}. {advice}, or set source.max_prompt_length to keep the end of long prompts. It "
                f"starts: '{start}'"
            )
        return None

    def response_tokens(self, prompt: Prompt, response: str) -> list[int]:
        """Token ids of a given response, including its end token."""
        if self.turn is not None and not isinstance(prompt, str):
            return closed_answer(self.tokenizer, prompt, response, self.turn)
        ids: list[int] = self.tokenizer(response, add_special_tokens=False)["input_ids"]
        return ids if ids and ids[-1] in self.end_ids else [*ids, self.end_ids[0]]

    def encode(self, rows: Sequence[Row]) -> PromptBatch:
        """Collate rows into a left-padded batch, for the prompt loaders."""
        ids = [self.tokens(row["prompt"]) for row in rows]
        width = max(len(i) for i in ids)
        pad = int(self.tokenizer.pad_token_id)
        return PromptBatch(
            prompts=[self.render(row["prompt"]) for row in rows],
            given=[row["prompt"] for row in rows],
            columns={name: [row[name] for row in rows] for name in rows[0] if name != "prompt"},
            input_ids_BP=torch.tensor([[pad] * (width - len(i)) + i for i in ids]),
            attention_mask_BP=torch.tensor([[0] * (width - len(i)) + [1] * len(i) for i in ids]),
        )

    def encode_candidates(self, batch: PromptBatch, responses: Sequence[Sequence[str]]) -> tuple[Responses, Tensor]:
        """Append given responses to their prompts, as if they had been generated.

        Args:
            batch: the prompts.
            responses: the candidates of each prompt.

        Returns:
            The responses, grouped by prompt, and ``group_B``, the index of each response's prompt.
        """
        group = [i for i, candidates in enumerate(responses) for _ in candidates]
        ids = [
            self.response_tokens(prompt, text)
            for prompt, candidates in zip(batch.given, responses, strict=True)
            for text in candidates
        ]
        width, pad = max(map(len, ids)), int(self.tokenizer.pad_token_id)
        device = batch.input_ids_BP.device
        group_B = torch.tensor(group, device=device)
        tokens_BT = torch.tensor([i + [pad] * (width - len(i)) for i in ids], device=device)
        mask_BT = torch.tensor([[True] * len(i) + [False] * (width - len(i)) for i in ids], device=device)
        attention_BP = batch.attention_mask_BP[group_B]
        return Responses(
            input_ids_BL=torch.cat([batch.input_ids_BP[group_B], tokens_BT], 1),
            attention_mask_BL=torch.cat([attention_BP, mask_BT.to(attention_BP.dtype)], 1),
            mask_BT=mask_BT,
            truncated_B=torch.zeros(len(group), dtype=torch.bool, device=device),
            prompts=[batch.prompts[i] for i in group],
            completions=[text for candidates in responses for text in candidates],
            columns={},
        ), group_B

    def decode(self, batch: PromptBatch, sequences_BL: Tensor) -> Responses:
        """Extract the responses from generated sequences, which start with the batch's prompts."""
        tokens_BT = sequences_BL[:, batch.input_ids_BP.shape[1] :]
        is_end_BT = torch.isin(tokens_BT, torch.tensor(self.end_ids, device=tokens_BT.device))
        mask_BT = (is_end_BT.long().cumsum(1) - is_end_BT.long()) == 0  # up to and including the first end token
        shown_BT = mask_BT if self.turn is None else mask_BT & (tokens_BT != self.turn.end_token)
        texts = [
            self.tokenizer.decode(row[keep], skip_special_tokens=True)
            for row, keep in zip(tokens_BT.cpu(), shown_BT.cpu(), strict=True)
        ]
        return Responses(
            input_ids_BL=sequences_BL,
            attention_mask_BL=torch.cat([batch.attention_mask_BP, mask_BT.to(batch.attention_mask_BP.dtype)], 1),
            mask_BT=mask_BT,
            truncated_B=~is_end_BT.any(1),
            prompts=batch.prompts,
            completions=[str(text) for text in texts],
            columns=batch.columns,
        )
