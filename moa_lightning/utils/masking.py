"""Masks tokens and passwords in what a run records."""

import re
from collections.abc import Mapping
from typing import Any

from jsonargparse import Namespace

MASK = "***masked***"
"""Placeholder for a secret."""

_WORDS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+")
_SECRET_WORDS = {"token", "password", "passwd", "passphrase", "secret", "authorization", "credential", "credentials"}
_SECRET_KEYS = {"api", "access", "private", "secret", "auth", "account", "signing"}
# Words before "token" that mean a token of a vocabulary.
_TOKENS = {"bos", "eos", "pad", "unk", "sep", "cls", "mask", "image", "audio", "video", "stop", "end", "start", "per"}
_SHAPES = re.compile(
    r"""\b(?:
        hf_[A-Za-z0-9]{16,}                       # Hugging Face
      | sk-[A-Za-z0-9_-]{16,}                     # several model services
      | (?:ghp|gho|ghs|ghu)_[A-Za-z0-9]{20,} | github_pat_\w{20,} | glpat-[\w-]{16,}
      | xox[abprs]-[\w-]{10,}
      | (?:AKIA|ASIA)[0-9A-Z]{16}                 # AWS
      | eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]+        # a JSON web token
    )
    | (?<=://) [^\s/@:]+ : [^\s/@]+ (?=@)         # user:password of an address
    | (?<=\bBearer[ ]) [\w.~+/=-]{8,}
    """,
    re.VERBOSE,
)


def masked(value: Any, name: str = "") -> Any:
    """Copy settings with every secret masked.

    A secret is a text under a name such as ``token``, ``api_key`` or ``password``, or any text in the format of a known
    kind of key.

    Args:
        value: plain data, or a parser's namespace.
        name: of the setting.

    Example:
        >>> masked({"options": {"token": "abc", "max_new_tokens": 8}, "pad_token": "<pad>"})
        {'options': {'token': '***masked***', 'max_new_tokens': 8}, 'pad_token': '<pad>'}
    """
    if isinstance(value, Namespace):
        copy = value.clone()
        for key, part in vars(value).items():
            copy[key] = masked(part, key)
        return copy
    if isinstance(value, Mapping):
        return {key: masked(part, str(key)) for key, part in value.items()}
    if isinstance(value, list):
        return [masked(part, name) for part in value]
    if not isinstance(value, str):  # a number under such a name is more likely an objective's weight or threshold
        return value
    return MASK if value and _is_secret(name) else _SHAPES.sub(MASK, value)


def masked_arguments(arguments: list[str]) -> list[str]:
    """Copy command-line arguments with every secret masked.

    >>> masked_arguments(["fit", "--model.policy.options.token=abc", "--password", "def"])
    ['fit', '--model.policy.options.token=***masked***', '--password', '***masked***']
    """
    found, name = [], ""
    for argument in arguments:
        flag, has_value, value = argument.partition("=")
        if flag.startswith("-"):
            found.append(f"{flag}={masked(value, _last(flag))}" if has_value else flag)
            name = "" if has_value else _last(flag)
        else:
            found.append(masked(argument, name))
            name = ""
    return found


def masked_settings(value: Any, path: str = "") -> list[str]:
    """Dotted names of the settings with a masked value."""
    if isinstance(value, Namespace):
        value = vars(value)
    if isinstance(value, Mapping):
        parts = [(f"{path}.{key}" if path else str(key), part) for key, part in value.items()]
    elif isinstance(value, list):
        parts = [(f"{path}.{i}", part) for i, part in enumerate(value)]
    else:
        return [path] if isinstance(value, str) and MASK in value else []
    return [name for at, part in parts for name in masked_settings(part, at)]


def _is_secret(name: str) -> bool:
    words = [word.lower() for word in _WORDS.findall(name)]
    if not words:
        return False
    before = words[-2] if len(words) > 1 else ""
    return (words[-1] in _SECRET_WORDS and before not in _TOKENS) or (
        words[-1] == "apikey" or (words[-1] == "key" and before in _SECRET_KEYS)
    )


def _last(flag: str) -> str:
    return flag.lstrip("-").rpartition(".")[2]
