r"""Dialogues in the form of HH-RLHF: ``\n\nHuman: …\n\nAssistant: …``."""

from typing import Any

ASSISTANT = "\n\nAssistant:"


def split_dialogue(text: str) -> tuple[str, str]:
    """A dialogue's prompt, up to and with the last ``Assistant:``, and the response after it.

    Raises:
        ValueError: there is no ``Assistant:`` in it.
    """
    at = text.rfind(ASSISTANT)
    if at < 0:
        raise ValueError("the dialogue has no '\\n\\nAssistant:' turn")
    end = at + len(ASSISTANT)
    return text[:end], text[end:]


def hh_prompt(row: dict[str, Any]) -> str:
    """The prompt of a row of HH-RLHF: what ``chosen`` holds before the last response."""
    if not isinstance(row.get("chosen"), str):
        raise ValueError("the row has no text in 'chosen'")
    return split_dialogue(row["chosen"])[0]
