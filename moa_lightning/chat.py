"""Chat templates: formatting messages, and finding where an answer starts and ends."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moa_lightning.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]
Prompt = str | list[Message]
"""Text, or chat messages ``{"role": …, "content": …}``."""

_QUESTION, _ANSWER = "question", "moaprobe"  # the second must occur nowhere else in the text


class TemplateError(UserError):
    """The chat template refuses these messages."""


@dataclass(frozen=True)
class Turn:
    """What a chat template writes around an answer."""

    start: str  # such as "<|im_start|>assistant\n"; empty if prompts end like other turns
    end: str  # such as "<|im_end|>\n"
    end_token: int  # end-of-turn token, such as "<|im_end|>"

    def starts_answer(self, prompt: str) -> bool:
        """Whether a text ends like the template's prompts. False if the template writes nothing before an answer."""
        return bool(self.start.strip()) and prompt.endswith(self.start)


def is_chat(value: Any) -> bool:
    """Whether a value is a list of messages with text in ``role`` and ``content``."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(m, dict) and all(isinstance(m.get(k), str) for k in ("role", "content")) for m in value)
    )


def render(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], answer: str | None = None) -> str:
    """Format a conversation with the chat template.

    Args:
        tokenizer: with the template.
        messages: up to the answer.
        answer: the assistant's; ``None`` ends the text where the answer starts.

    Raises:
        TemplateError: the template refuses the messages.
    """
    conversation = [*messages, *([] if answer is None else [{"role": "assistant", "content": answer}])]
    try:
        return str(tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=answer is None))
    except Exception as error:  # a template is a program, and may raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise TemplateError(f"the chat template refuses the messages: {reason}") from error


def check_template(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Refuse a chat template that is not valid Jinja. A template that only refuses some messages is fine.

    Raises:
        TemplateError: one line with Jinja's reason.
    """
    try:
        render(tokenizer, [{"role": "user", "content": _QUESTION}])
    except TemplateError as error:
        from jinja2 import TemplateSyntaxError

        if isinstance(error.__cause__, TemplateSyntaxError):
            raise TemplateError(f"the chat template is not Jinja: {error.__cause__.message}") from error


def answer_turn(tokenizer: "PreTrainedTokenizerBase") -> Turn | None:
    """Find what the tokenizer's template writes around an answer, by rendering one.

    The end token is the first special or added token after the answer. If there is none, it is the text after the
    answer, if that is a single token. Otherwise (white space, a phrase of several tokens, no template) the result is
    ``None``: no token would end a sampled response.
    """
    if not tokenizer.chat_template:
        return None
    question = [{"role": "user", "content": _QUESTION}]
    try:
        conversation, prompt = render(tokenizer, question, _ANSWER), render(tokenizer, question)
    except TemplateError:
        return None
    before, _, end = conversation.rpartition(_ANSWER)
    start = before[before.rfind(_QUESTION) + len(_QUESTION) :]
    ids: list[int] = tokenizer(end, add_special_tokens=False)["input_ids"] if before and end.strip() else []
    known = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder} - {tokenizer.unk_token_id}
    ends = [token for token in ids if token in known and str(tokenizer.decode([token])).strip()]  # some add white space
    if not ends and ids:
        alone: list[int] = tokenizer(end.strip(), add_special_tokens=False)["input_ids"]
        ends = alone if len(alone) == 1 and alone[0] != tokenizer.unk_token_id else []
    return Turn(start if prompt.endswith(start) else "", end, ends[0]) if ends else None


def end_tokens(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Tokens that end a response: the tokenizer's end token, then the chat template's end-of-turn token."""
    turn = answer_turn(tokenizer)
    ids = [tokenizer.eos_token_id, None if turn is None else turn.end_token]
    return list(dict.fromkeys(int(i) for i in ids if i is not None))


def answer_tokens(tokenizer: "PreTrainedTokenizerBase", prompt: str, answer: str, turn: Turn) -> list[int]:
    """Tokens of an answer, with the template's end of turn, to a prompt that the template has already formatted.

    Args:
        tokenizer: with the template.
        prompt: up to the answer.
        answer: without its end.
        turn: what the template writes around it.
    """
    return _tokens_after(tokenizer, prompt, prompt + answer + turn.end, answer + turn.end)


def closed_answer(
    tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], answer: str, turn: Turn
) -> list[int]:
    """Tokens of an answer to chat messages, with everything that the template writes after it.

    They are the tokens of the full conversation without those of the prompt that the policy reads, as in TRL 1.16
    (``DPOTrainer``, ``SFTTrainer``). Some templates write a prompt differently once it has an answer, so that the
    conversation does not start with the prompt. TRL then shortens the prompt to the common prefix; here the prompt
    stays as it is for generation.

    Args:
        tokenizer: with the template.
        messages: the prompt.
        answer: the assistant's, with or without its end token.
        turn: of :func:`answer_turn`.

    Raises:
        TemplateError: the template refuses the messages.
    """
    for end in (turn.end, turn.end.strip(), str(tokenizer.decode([turn.end_token]))):
        answer = answer.removesuffix(end)  # some templates write more after the token, which a row may lack
    prompt, conversation = render(tokenizer, messages), render(tokenizer, messages, answer)
    return _tokens_after(tokenizer, prompt, conversation, answer + turn.end)


def _tokens_after(tokenizer: "PreTrainedTokenizerBase", prompt: str, conversation: str, answer: str) -> list[int]:
    """Tokens of a conversation after those of its prompt. If it does not start with them, tokens of the text after it.

    If not even its text starts with the prompt, the result is the tokens of ``answer``.
    """
    before: list[int] = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    ids: list[int] = tokenizer(conversation, add_special_tokens=False)["input_ids"]
    if ids[: len(before)] == before:
        return ids[len(before) :]
    text = conversation.removeprefix(prompt) if conversation.startswith(prompt) else answer
    after: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return after
