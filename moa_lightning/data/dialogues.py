r"""Dialogues in the format of HH-RLHF: ``\n\nHuman: …\n\nAssistant: …``, as whole texts.

Source: Bai et al., "Training a Helpful and Harmless Assistant with RLHF", arXiv 2204.05862.
"""

from collections.abc import Mapping
from itertools import takewhile
from typing import Any

from moa_lightning.errors import UserError

ASSISTANT = "\n\nAssistant:"


def split_dialogue(text: str) -> tuple[str, str]:
    r"""The prompt, up to and with the last ``\n\nAssistant:``, and the response after it.

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

    Two dialogues that part at an earlier turn give the prompt of that turn; two that share no such prompt, or a row
    without ``rejected``, give the prompt of ``chosen``.

    Raises:
        UserError: ``chosen`` is missing or is no dialogue.
    """
    chosen = row.get("chosen")
    if not isinstance(chosen, str):
        raise UserError("the row has no text in column 'chosen'")
    pairs = zip(chosen, row.get("rejected") or chosen, strict=False)  # they end at different places
    shared = "".join(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    return split_dialogue(shared if ASSISTANT in shared else chosen)[0]
