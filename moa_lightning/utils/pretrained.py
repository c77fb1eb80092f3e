"""Loading from Hugging Face folders and hub ids, with errors that say what to do."""

import re
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from moa_lightning.errors import UserError


def open_pretrained(auto_class: Any, path: str, what: str, **arguments: Any) -> Any:
    """``auto_class.from_pretrained(path, **arguments)``, with a one-line error.

    Args:
        auto_class: one of transformers' ``Auto…`` classes.
        path: folder or hub id.
        what: name of what is loaded, for the message.
        arguments: for ``from_pretrained``.

    Raises:
        UserError: the folder does not exist, or loading fails.
    """
    folder = Path(path).expanduser()
    if folder.is_file():
        raise UserError(f"'{path}' is a file; give the folder in Hugging Face format that it is in, or a hub id")
    # A hub id is "name" or "owner/name"; anything else must be a folder.
    if not path or (not folder.is_dir() and (path.startswith((".", "/", "~")) or path.count("/") > 1)):
        raise UserError(
            f"folder '{path}' does not exist{_nearest(folder)}; give a folder in Hugging Face format, or a hub id"
        )
    try:
        return auto_class.from_pretrained(str(folder) if folder.is_dir() else path, **arguments)
    except Exception as error:
        # A broken file makes transformers raise anything, over several lines.
        reason = _first_sentences(str(error)) or type(error).__name__
        where = "the folder" if folder.is_dir() else f"there is no folder of that name{_nearest(folder)}, and the hub"
        raise UserError(f"'{path}' does not open as a {what}: {where} gave: {reason}") from error


def _nearest(folder: Path) -> str:
    """A hint with the sibling folder whose name is most similar; empty if there is none."""
    siblings = [other.name for other in folder.parent.iterdir() if other.is_dir()] if folder.parent.is_dir() else []
    near = get_close_matches(folder.name, siblings, n=1)
    return f" (did you mean '{folder.with_name(near[0])}'?)" if near else ""


def _first_sentences(text: str, limit: int = 200) -> str:
    """The start of a text in one line, shortened at the end of a sentence if possible.

    >>> _first_sentences("We could not connect. Check your connection", 30)
    'We could not connect.'
    """
    line = " ".join(text.split())
    if len(line) <= limit:
        return line
    sentences = re.match(r".*[.!?](?= )", line[: limit + 1])
    return sentences[0] if sentences else line[:limit]


def open_tokenizer(path: str, **arguments: Any) -> Any:
    """Load the tokenizer from a folder or hub id.

    Raises:
        UserError: loading fails, or its files are missing. transformers would create an empty tokenizer from the
            model's config then, and every text would have the same tokens.
    """
    from transformers import AutoTokenizer

    tokenizer = open_pretrained(AutoTokenizer, path, "tokenizer", **arguments)
    if len(set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens)) <= 1:
        raise UserError(
            f"'{path}' has no tokenizer files; save the model's tokenizer there (tokenizer.save_pretrained(folder))"
        )
    return tokenizer
