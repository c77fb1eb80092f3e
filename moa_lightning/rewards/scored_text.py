"""What a classifier reads of a prompt and its completion."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from moa_lightning.errors import UserError


class ScoredText(ABC):
    """Turns prompts and completions into tokens of the classifier."""

    def check(self, tokenizer: Any) -> None:
        """Refuse a tokenizer that cannot do it.

        Raises:
            UserError: one line that says what to write instead.
        """

    @abstractmethod
    def encode(self, tokenizer: Any, prompts: list[str], completions: list[str], **options: Any) -> Any:
        """Tokens by input name (``input_ids``, …), one list per text; ``options`` go to the tokenizer."""


@dataclass(frozen=True)
class PromptAndCompletion(ScoredText):
    """The prompt, then the completion, as one text.

    Args:
        separator: text between them.
    """

    separator: str = ""

    def encode(self, tokenizer: Any, prompts: list[str], completions: list[str], **options: Any) -> Any:
        """One text each."""
        return tokenizer([p + self.separator + c for p, c in zip(prompts, completions, strict=True)], **options)


@dataclass(frozen=True)
class CompletionOnly(ScoredText):
    """The completion, without its prompt."""

    def encode(self, tokenizer: Any, prompts: list[str], completions: list[str], **options: Any) -> Any:
        """One text each."""
        return tokenizer(completions, **options)


@dataclass(frozen=True)
class TextPair(ScoredText):
    """The prompt as first and the completion as second text: the tokenizer puts its separators between them.

    Too long a pair loses tokens at the start of its longer part.
    """

    def encode(self, tokenizer: Any, prompts: list[str], completions: list[str], **options: Any) -> Any:
        """Two texts each."""
        return tokenizer(prompts, completions, **options)


@dataclass(frozen=True)
class Chat(ScoredText):
    """A user's message and the assistant's answer, through the classifier's own chat template.

    For reward models that were trained on chats. The prompt is taken as the user's message as it is, so the data's
    prompts should be plain text: chat messages would carry the policy's template into the classifier's.
    """

    def check(self, tokenizer: Any) -> None:
        """Refuse a tokenizer without a chat template."""
        if not tokenizer.chat_template:
            raise UserError(
                "text Chat needs a chat template, and the classifier's tokenizer has none; use text "
                "PromptAndCompletion or TextPair"
            )

    def encode(self, tokenizer: Any, prompts: list[str], completions: list[str], **options: Any) -> Any:
        """One conversation each. The template writes its own special tokens."""
        chats = [
            [{"role": "user", "content": p}, {"role": "assistant", "content": c}]
            for p, c in zip(prompts, completions, strict=True)
        ]
        texts = tokenizer.apply_chat_template(chats, tokenize=False)
        return tokenizer(texts, add_special_tokens=False, **options)
