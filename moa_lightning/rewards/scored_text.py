"""The text that a classifier scores, built from a prompt and its completion."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from typing_extensions import override

from moa_lightning.errors import UserError


class ScoredText(ABC):
    """Encodes prompts and completions with the classifier's tokenizer."""

    def check(self, tokenizer: Any) -> None:
        """Refuse a tokenizer that cannot encode this text.

        Raises:
            UserError: one line that says what to choose instead.
        """

    @abstractmethod
    def encode(self, tokenizer: Any, prompts: list[str], completions: list[str], **options: Any) -> Any:
        """Encode to token lists by input name (``input_ids``, …), one per text; ``options`` go to the tokenizer."""


@dataclass(frozen=True)
class PromptAndCompletion(ScoredText):
    """The prompt, then the completion, as one text.

    Args:
        separator: text between them.
    """

    separator: str = ""

    @override
    def encode(self, tokenizer: Any, prompts: list[str], completions: list[str], **options: Any) -> Any:
        return tokenizer([p + self.separator + c for p, c in zip(prompts, completions, strict=True)], **options)


@dataclass(frozen=True)
class CompletionOnly(ScoredText):
    """The completion, without its prompt."""

    @override
    def encode(self, tokenizer: Any, prompts: list[str], completions: list[str], **options: Any) -> Any:
        return tokenizer(completions, **options)


@dataclass(frozen=True)
class TextPair(ScoredText):
    """The prompt as first and the completion as second text, with the tokenizer's separators.

    A pair that is too long loses tokens at the start of its longer part.
    """

    @override
    def encode(self, tokenizer: Any, prompts: list[str], completions: list[str], **options: Any) -> Any:
        return tokenizer(prompts, completions, **options)


@dataclass(frozen=True)
class Chat(ScoredText):
    """A user message and the assistant's answer, formatted with the classifier's own chat template.

    For reward models that were trained on chats. The prompt becomes the user message unchanged, so the data's prompts
    should be plain text: chat messages would already be formatted with the policy's template.
    """

    def check(self, tokenizer: Any) -> None:
        """Refuse a tokenizer without a chat template."""
        if not tokenizer.chat_template:
            raise UserError(
                "text Chat needs a chat template, and the classifier's tokenizer has none; use text "
                "PromptAndCompletion or TextPair"
            )

    def encode(self, tokenizer: Any, prompts: list[str], completions: list[str], **options: Any) -> Any:
        """Encode one conversation per completion. The template writes the special tokens."""
        chats = [
            [{"role": "user", "content": p}, {"role": "assistant", "content": c}]
            for p, c in zip(prompts, completions, strict=True)
        ]
        texts = tokenizer.apply_chat_template(chats, tokenize=False)
        return tokenizer(texts, add_special_tokens=False, **options)
