r"""Dialogues in the format of HH-RLHF, as a single text: ``\n\nHuman: …\n\nAssistant: …``.

Source: Bai et al., "Training a Helpful and Harmless Assistant with RLHF", arXiv 2204.05862.
"""

from collections.abc import Mapping
from itertools import takewhile
from typing import Any

from moa_lightning.errors import UserError

ASSISTANT = "\n\nAssistant:"


def split_dialogue(text: str) -> tuple[str, str]:
    r"""Split a dialogue into the prompt, which ends with the last ``\n\nAssistant:``, and the response after it.

    Raises:
        UserError: there is no such marker.

    Example:
        >>> split_dialogue("\n\nHuman: Hello\n\nAssistant: Hi.")
        ('\n\nHuman: Hello\n\nAssistant:', ' Hi.')
    """
    end = text.rfind(ASSISTANT)
    if end < 0:
        raise UserError(r"a dialogue needs '\n\nAssistant:' before each answer, this text has none")
    end += len(ASSISTANT)
    return text[:end], text[end:]


def hh_prompt(row: Mapping[str, Any]) -> str:
    r"""The prompt of a row with ``chosen`` (and ``rejected``): their shared text up to the last ``\n\nAssistant:``.

    If the dialogues differ at an earlier turn, the prompt is that of the earlier turn. If they share no prompt, or the
    row has no ``rejected``, it is the prompt of ``chosen``.

    Raises:
        UserError: ``chosen`` is missing or not a dialogue.
    """
    chosen = row.get("chosen")
    if not isinstance(chosen, str):
        raise UserError("the row has no text in column 'chosen'")
    pairs = zip(chosen, row.get("rejected") or chosen, strict=False)  # they differ in length
    shared = "".join(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    return split_dialogue(shared if ASSISTANT in shared else chosen)[0]
