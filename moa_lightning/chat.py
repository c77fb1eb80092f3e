"""Chat messages as a tokenizer's template writes them: where an answer starts, and how it ends."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateSyntaxError

from moa_lightning.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]
Prompt = str | list[Message]
"""Text, or chat messages ``{"role": …, "content": …}``."""

_QUESTION, _ANSWER = "question", "moaprobe"  # the second must stand nowhere else in the text


class TemplateError(UserError):
    """The chat template refuses these messages; says so in one line."""


@dataclass(frozen=True)
class Turn:
    """What a chat template writes around an answer."""

    start: str  # such as "<|im_start|>assistant\n"; empty where prompts end like other turns
    end: str  # such as "<|im_end|>\n"
    end_token: int  # the one that ends the turn, such as that of "<|im_end|>"

    def starts_answer(self, prompt: str) -> bool:
        """Whether a text ends as the template's prompts do. False where the template writes nothing there."""
        return bool(self.start.strip()) and prompt.endswith(self.start)


def is_chat(value: Any) -> bool:
    """Whether a value is a list of messages with text in ``role`` and ``content``."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(m, dict) and all(isinstance(m.get(k), str) for k in ("role", "content")) for m in value)
    )


def render(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], answer: str | None = None) -> str:
    """The text of a conversation.

    Args:
        tokenizer: with the template.
        messages: up to the answer.
        answer: the assistant's; ``None`` ends where it starts.

    Raises:
        TemplateError: the template refuses the messages.
    """
    said = [*messages, *([] if answer is None else [{"role": "assistant", "content": answer}])]
    try:
        return str(tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=answer is None))
    except Exception as error:  # a template is a program, and may raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise TemplateError(f"the chat template refuses the messages: {reason}") from error


def check_template(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Refuse a chat template that is no Jinja text. One that only refuses some messages is fine.

    Raises:
        TemplateError: says what is wrong with it.
    """
    try:
        render(tokenizer, [{"role": "user", "content": _QUESTION}])
    except TemplateError as error:
        if isinstance(error.__cause__, TemplateSyntaxError):
            raise TemplateError(f"the chat template is not Jinja: {error.__cause__.message}") from error


def answer_turn(tokenizer: "PreTrainedTokenizerBase") -> Turn | None:
    """What the tokenizer's template writes around an answer: found by rendering one.

    The end token is the first special or added token behind the answer; failing that, what stands there if it is one
    token. ``None`` where neither is there (white space, a phrase of several tokens, no template): nothing would tell
    the sampler where to stop.
    """
    if not tokenizer.chat_template:
        return None
    question = [{"role": "user", "content": _QUESTION}]
    try:
        whole, prompt = render(tokenizer, question, _ANSWER), render(tokenizer, question)
    except TemplateError:
        return None
    before, _, end = whole.rpartition(_ANSWER)
    start = before[before.rfind(_QUESTION) + len(_QUESTION) :]
    ids: list[int] = tokenizer(end, add_special_tokens=False)["input_ids"] if before and end.strip() else []
    known = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder} - {tokenizer.unk_token_id}
    ends = [token for token in ids if token in known and str(tokenizer.decode([token])).strip()]  # some add white space
    if not ends and ids:
        alone: list[int] = tokenizer(end.strip(), add_special_tokens=False)["input_ids"]
        ends = alone if len(alone) == 1 and alone[0] != tokenizer.unk_token_id else []
    return Turn(start if prompt.endswith(start) else "", end, ends[0]) if ends else None


def end_tokens(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The tokens that end a response: the tokenizer's first, then the one that ends a turn of its chat template."""
    turn = answer_turn(tokenizer)
    ids = [tokenizer.eos_token_id, None if turn is None else turn.end_token]
    return list(dict.fromkeys(int(i) for i in ids if i is not None))


def answer_tokens(tokenizer: "PreTrainedTokenizerBase", prompt: str, answer: str, turn: Turn) -> list[int]:
    """Tokens of an answer whose prompt is text that a template has written, closed as the template closes it.

    Args:
        tokenizer: with the template.
        prompt: up to the answer.
        answer: without its end.
        turn: what the template writes around it.
    """
    return _behind(tokenizer, prompt, prompt + answer + turn.end, answer + turn.end)


def closed_answer(
    tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], answer: str, turn: Turn
) -> list[int]:
    """Tokens of an answer to chat messages, with all that the template writes behind it.

    It is the conversation with the answer less the prompt that the policy reads, as TRL 1.16 takes it
    (``DPOTrainer``, ``SFTTrainer``). Where one does not start with the other (a template that writes a prompt
    differently once it is answered), TRL cuts the prompt back to what they share; here the prompt stays as generation
    reads it.

    Args:
        tokenizer: with the template.
        messages: the prompt.
        answer: the assistant's, with or without its end token.
        turn: of :func:`answer_turn`.

    Raises:
        TemplateError: the template refuses the messages.
    """
    for end in (turn.end, turn.end.strip(), str(tokenizer.decode([turn.end_token]))):
        answer = answer.removesuffix(end)  # some templates write more behind the token, which a row may lack
    prompt, whole = render(tokenizer, messages), render(tokenizer, messages, answer)
    return _behind(tokenizer, prompt, whole, answer + turn.end)


def _behind(tokenizer: "PreTrainedTokenizerBase", prompt: str, whole: str, otherwise: str) -> list[int]:
    """Tokens of ``whole`` behind those of ``prompt``; where it does not start with them, of the text behind it."""
    before: list[int] = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    ids: list[int] = tokenizer(whole, add_special_tokens=False)["input_ids"]
    if ids[: len(before)] == before:
        return ids[len(before) :]
    text = whole.removeprefix(prompt) if whole.startswith(prompt) else otherwise
    behind: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return behind
