"""Turns the argument parser's messages into one line that says what to write instead."""

import difflib
import inspect
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

_MISSING_CLASS = re.compile(r"Expected a dot import path string: (\S+)")
_KEY = re.compile(r'Parser key "([^"]+)"')
_UNKNOWN_FIELD = re.compile(r"Option '([^']+)' is not accepted")
_UNKNOWN_FLAG = re.compile(r"unrecognized arguments: (\S+)")
_WRONG_VALUE = re.compile(r"Expected a (.+?)\. Got value: (.*)")


class UsageError(ValueError):
    """The command line or a config file cannot be understood."""


def explain(message: str, bases: Sequence[type], flags: Iterable[str]) -> str:
    """One line on what the parser refused, with what to write instead.

    Args:
        message: the parser's own, often of several lines.
        bases: the classes whose subclasses a user may name.
        flags: all flags of the command, without dashes.
    """
    keys = _KEY.findall(message)
    key = keys[-1].rsplit(".", 1)[-1] if keys else ""
    if found := _MISSING_CLASS.search(message):
        return _unknown_class(found[1], key, bases)
    if found := _UNKNOWN_FIELD.search(message):
        fields = {name for base in bases for kind in concrete(base) for name in _fields(kind)}
        owners = "; ".join(
            f"{kind.__name__} has {', '.join(_fields(kind)) or 'no fields'}"
            for base in bases
            if base.__name__.lower() == key.lower()
            for kind in concrete(base)
        )
        return f"unknown field '{found[1]}'{_closest(found[1], fields)}{'; ' + owners if owners else ''}"
    if found := _UNKNOWN_FLAG.search(message):
        given = found[1].lstrip("-").partition("=")[0]
        return f"unknown option '{found[1]}'{_closest(given, flags, '--')}"
    if found := _WRONG_VALUE.search(message):
        wanted = re.sub(r"<class '([^']+)'>", r"\1", found[1])
        wanted = re.sub(r"typing\.Literal\[(.*)\]", lambda m: "one of " + m[1].replace("'", ""), wanted)
        return f"'{'.'.join(keys)}' must be {wanted}; got '{found[2].strip()}'"
    return re.sub(r"\s+", " ", message).strip()


def concrete(base: type) -> list[type]:
    """The imported subclasses of a base class that can be built, by name."""
    children: list[type] = type.__subclasses__(base)
    below = {kind for child in children for kind in [child, *concrete(child)]}
    return sorted((kind for kind in below if not inspect.isabstract(kind)), key=lambda kind: kind.__name__)


def _unknown_class(given: str, key: str, bases: Sequence[type]) -> str:
    for base in bases:
        if key.lower() in base.__name__.lower() and key:
            known = [kind.__name__ for kind in concrete(base)]
            return (
                f"unknown {key} '{given}'{_closest(given, known)}; known: {', '.join(known)}. For a class of your own, "
                f"give its import path, such as my_package.{base.__name__}OfMine"
            )
    return f"unknown class '{given}' for '{key}'; give its import path"


def _fields(kind: type) -> list[str]:
    return [name for name in inspect.signature(kind).parameters if name not in {"args", "kwargs"}]


def _closest(given: str, known: Iterable[str], prefix: str = "") -> str:
    best = difflib.get_close_matches(given, list(known), n=1, cutoff=0.5)
    return f"; did you mean '{prefix}{best[0]}'?" if best else ""


def refuse_repeated_keys(args: Sequence[str]) -> None:
    """Refuse config files that give a key twice: YAML would keep the last one in silence.

    Raises:
        ValueError: names the file, the line and the key, such as an objective named twice.
    """
    for i, argument in enumerate(args):
        flag, _, value = argument.partition("=")
        if flag not in {"--config", "-c"}:
            continue
        path = Path(value or (args[i + 1] if i + 1 < len(args) else ""))
        if path.is_file():
            _check_node(yaml.compose(path.read_text(encoding="utf-8")), path)


def _check_node(node: Any, path: Path) -> None:
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _check_node(item, path)
    if not isinstance(node, yaml.MappingNode):
        return
    seen: set[str] = set()
    for key, value in node.value:
        if key.value in seen:
            raise ValueError(
                f"{path}, line {key.start_mark.line + 1}: '{key.value}' is given twice; rename or remove one of them"
            )
        seen.add(key.value)
        _check_node(value, path)
