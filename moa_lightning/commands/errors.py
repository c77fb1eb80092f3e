"""Turns the argument parser's messages into one line that says what to write instead."""

import difflib
import inspect
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser

from moa_lightning.errors import UserError
from moa_lightning.utils.import_path import import_dotted

_KEY = re.compile(r'Parser key "([^"]+)"')
_GIVEN = re.compile(r"(?:Given|Got) value: (.*)$", re.MULTILINE)
_CLASS = re.compile(r"Problem with given class_path '([^']+)'")
_UNKNOWN_CLASS = re.compile(r"Expected a dot import path string: (.+)")
_AMBIGUOUS = re.compile(r"Multiple subclasses with name (\w+)\..*: (.*)\.$", re.MULTILINE)
_UNKNOWN_FIELD = re.compile(r"Option '([^']+)' is not accepted(?: \(fields: ([^()]*)\))?")
_UNKNOWN_FLAG = re.compile(r"unrecognized arguments: (\S+)|does not accept option '([^']+)'")
_FIELD_OF_NOTHING = re.compile(r"NestedArg\(key='([^']+)', val='([^']*)'\)")
_REQUIRED = re.compile(r"the following arguments are required: (?:(?:fit|validate|test|predict)\.)?(\S+)")
_WRONG_VALUE = re.compile(r"Expected an? (.+?)\. Got value: .*$", re.MULTILINE)
_WRONG_FOR_ALL = re.compile(r"- Expected an? (.+?)\.?$", re.MULTILINE)
_NODES = 100_000  # of a config, with its aliases written out
_LITERAL = re.compile(r"typing\.Literal\[(.*)\]")


class UsageError(UserError):
    """The command line or a config file cannot be understood."""


class OneLineErrors(ArgumentParser):
    """A parser whose errors are one line with what to write instead."""

    def nameable(self) -> Sequence[type]:
        """The classes whose subclasses a user may name."""
        return ()

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Say what is wrong and stop with exit code 2."""
        parser = getattr(ex, "subcommand_parser", None) or self
        flags = [flag.lstrip("-") for action in parser._actions for flag in action.option_strings]
        if not self.exit_on_error:  # of one class among several that may be meant; the outermost parser explains
            fields = [flag for flag in flags if flag.isidentifier() and flag not in {"h", "help", "print_shtab"}]
            innermost = "is not accepted" in message and "(fields: " not in message
            super().error(f"{message} (fields: {', '.join(fields)})" if innermost else message, ex)
        raise UsageError(explain(message, self.nameable(), flags)) from ex


def explain(message: str, bases: Sequence[type], flags: Iterable[str]) -> str:
    """One line on what the parser refused, with what to write instead.

    Args:
        message: the parser's own, often of several lines.
        bases: the classes whose subclasses a user may name.
        flags: all flags of the command, without dashes.
    """
    path = ".".join(_KEY.findall(message))
    if found := _REQUIRED.search(message):
        name = f"{path}.{found[1]}".strip(".,")
        start = "; configs/demo.yaml is a whole one to start from" if name.startswith("model.") and not path else ""
        return f"{name} is missing; give it as --{name}=..., or in a config file (--config){start}"
    if found := _UNKNOWN_FLAG.search(message):
        given = found[1] or found[2]
        if found[1] and not given.startswith("-"):
            return f"'{given}' is not expected here; options are written --name=value"
        hint = closest(given.lstrip("-").partition("=")[0], flags, "--")
        return f"unknown option '{given}'{hint or '; --help lists the options'}"
    if (found := _UNKNOWN_FIELD.search(message)) and "class_path='typing.Union'" not in message:
        given, fields = found[1].partition(".")[0], [field for field in (found[2] or "").split(", ") if field]
        classes = [path.rpartition(".")[2] for path in _CLASS.findall(message)]
        has = f"it has {', '.join(fields)}" if fields else "it has none; leave it out"
        named = [kind for base in bases for kind in concrete(base) if classes and kind.__name__ == classes[-1]]
        if why := next((lacks[given] for kind in named if given in (lacks := getattr(kind, "lacks", {}))), None):
            return f"{path}: {classes[-1]} has no field '{given}': {why}"
        return f"{path}: {classes[-1] if classes else 'it'} has no field '{given}'{closest(given, fields)}; {has}"
    if found := _AMBIGUOUS.search(message):
        return f"{path}: several classes are called '{found[1]}'; give the import path of one of them: {found[2]}"
    base = _base_of(path, bases)
    if (found := _UNKNOWN_CLASS.search(message)) and base is not None:
        return _unknown_class(found[1].strip(), path, base, "a number, " if "<class 'float'>" in message else "")
    no_class = "abstract" in message or "class_path='typing.Union'" in message
    if (found := _FIELD_OF_NOTHING.search(message)) and base is not None and no_class:
        known = ", ".join(kind.__name__ for kind in concrete(base))
        field = f"--{path}.{found[1]}={found[2]}"
        return f"{path} has no class yet whose field this is; write --{path}=NAME {field}; known: {known}"
    innermost = message.partition("Given value type")[0]
    wanted = _WRONG_VALUE.findall(message) or _WRONG_FOR_ALL.findall(innermost)
    if wanted and (refused := _GIVEN.search(message)):  # the first one is the innermost
        if base is not None and (why := _no_class(refused[1].strip(), path, base)):
            return why
        given = refused[1].partition(". Got value: ")[0].strip()
        return f"'{path}' must be {_values_of(wanted)}; got '{'null' if given == 'None' else given}'"
    return " ".join(message.split())


def name_objective(message: str, args: Sequence[str]) -> str:
    """A message with the objective whose field it is about, if one objective alone was given this value.

    Objectives are entries of a mapping, and the parser names the mapping.

    Args:
        message: of :func:`explain`.
        args: of the command line; their config files are YAML.

    Example:
        >>> name_objective("'model.objectives.scale' must be float; got 'x'", ["--model.objectives.good.scale=x"])
        "'model.objectives.good.scale' must be float; got 'x'"
    """
    if not (found := re.match(r"'model\.objectives\.([\w.]+)' must .*; got '(.*)'$", message)):
        return message
    field, given = found.groups()
    names = [
        flag[1]
        for argument in args
        if (flag := re.fullmatch(rf"--model\.objectives\.([\w-]+)\.{re.escape(field)}=(.*)", argument))
        and flag[2] == given
    ]
    for path in _config_files(args):
        model = (yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}).get("model")
        objectives = model.get("objectives") if isinstance(model, dict) else None
        for name, settings in objectives.items() if isinstance(objectives, dict) else ():
            if isinstance(settings, dict) and field in settings and str(settings[field]) == given:
                names.append(str(name))
    return message.replace("objectives.", f"objectives.{names[0]}.", 1) if len({*names}) == 1 else message


def concrete(base: type) -> list[type]:
    """The imported subclasses of a base class, or itself if it has none: those that can be built, by name.

    Private ones, and those that other libraries bring along, are left out.
    """
    children: list[type] = type.__subclasses__(base)
    below = {kind for child in children for kind in [child, *concrete(child)]} or {base}
    libraries = {base.__module__.partition(".")[0], __name__.partition(".")[0]}
    ours = [kind for kind in below if kind.__module__.partition(".")[0] in libraries and kind.__name__[0] != "_"]
    return sorted((kind for kind in ours if not inspect.isabstract(kind)), key=lambda kind: kind.__name__)


def _base_of(path: str, bases: Sequence[type]) -> type | None:
    """The class that a key asks for, by its name: ``model.source.advantages`` is an ``AdvantageEstimator``."""
    key = path.rpartition(".")[2].replace("_", "").removesuffix("s")
    if key == "lr":  # a number, and not the LRScheduler that its name begins
        return None
    return next((base for base in bases if key and key in base.__name__.lower()), None)


def _unknown_class(given: str, path: str, base: type, others: str) -> str:
    known = [kind.__name__ for kind in concrete(base)]
    if known == [base.__name__]:
        fields = ", ".join(inspect.signature(base).parameters)
        return f"{path} must hold fields of {base.__name__} ({fields}); got '{given}'"
    return (
        f"unknown {path.rpartition('.')[2]} '{given}'{closest(given, known)}; known: {others}{', '.join(known)}. For "
        f"a class of your own, give its import path, such as my_package.{base.__name__}OfMine"
    )


def _no_class(given: str, path: str, base: type) -> str:
    """Why a dotted path names no class of this kind; empty if it is no such path."""
    if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)+", given):
        return ""
    try:
        import_dotted(given)
    except UserError as error:
        return f"{path}: {str(error).replace('function', 'class', 1)}"
    return f"{path}: '{given}' is no {base.__name__}; subclass {base.__module__.rpartition('.')[0]}.{base.__name__}"


def _values_of(types: Sequence[str]) -> str:
    """Types as users write their values: ``one of token, batch``, ``float or null``."""
    literals = [choice.strip(" '") for text in types for found in _LITERAL.findall(text) for choice in found.split(",")]
    others = [
        text for text in types if not _LITERAL.search(text) and not text.startswith(("path but ", "dot import path "))
    ]
    others = [re.sub(r"<class '(?:[\w.]*\.)?(\w+)'>", r"\1", text) for text in others]
    choices = [f"one of {', '.join(dict.fromkeys(literals))}"] if literals else []
    return " or ".join(dict.fromkeys([*choices, *others])).replace("NoneType", "null")


def closest(given: str, known: Iterable[str], prefix: str = "") -> str:
    """The end of a message that asks for the known name nearest to the given one; empty if none is near."""
    written = {name.lower(): name for name in known}  # 'pama' is as near to 'PAMA' as can be
    best = difflib.get_close_matches(given.lower(), list(written), n=1, cutoff=0.5)
    return f"; did you mean '{prefix}{written[best[0]]}'?" if best else ""


def check_config_files(args: Sequence[str], known: Collection[str] | None = None) -> None:
    """Refuse config files that are not there, are not YAML, or give a key twice: YAML would keep the last in silence.

    Args:
        args: of the command line.
        known: the names of all settings at the top, which the parser alone would let pass if they are unknown.

    Raises:
        UserError: names the file, the line and the key, such as an objective named twice.
    """
    for given in _config_files(args):
        path = Path(given)
        if not path.is_file():
            names = [str(other) for other in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
            raise UserError(f"config file '{given}' does not exist{closest(given, names)}")
        node = _composed(path)
        _check_node(node, path, {})
        for key, _ in node.value:
            if known is not None and key.value.partition(".")[0] not in known:
                near = closest(key.value, known) or f"; known: {', '.join(sorted(known))}"
                raise UserError(f"{path}, line {key.start_mark.line + 1}: unknown setting '{key.value}'{near}")


def _config_files(args: Sequence[str]) -> Iterator[str]:
    """The config files that a command line names."""
    for i, argument in enumerate(args):
        flag, _, value = argument.partition("=")
        if flag in {"--config", "-c"}:
            yield value or (args[i + 1] if i + 1 < len(args) else "")


def _composed(path: Path) -> Any:
    try:
        node = yaml.compose(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise UserError(f"{path} is nested too deeply to be settings") from error
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{path}{line} is not YAML: {error.problem or error.context}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"{path} must hold settings, such as 'trainer:' with 'max_steps: 100' below it")
    return node


def _check_node(node: Any, path: Path, sizes: dict[int, int]) -> int:
    """Refuse keys that are given twice, and aliases that stand for far more than the file holds; the size in nodes."""
    if id(node) in sizes:
        if sizes[id(node)] == 0:
            raise UserError(f"{path}, line {node.start_mark.line + 1}: an alias stands for something that holds itself")
        return sizes[id(node)]
    sizes[id(node)] = 0  # it is being looked at
    size, seen = 1, set[Any]()
    if isinstance(node, yaml.SequenceNode):
        size += sum(_check_node(item, path, sizes) for item in node.value)
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise UserError(f"{path}, line {key.start_mark.line + 1}: a key must be one word")
            if key.value in seen:
                raise UserError(
                    f"{path}, line {key.start_mark.line + 1}: '{key.value}' is given twice; rename or remove one of "
                    "them"
                )
            seen.add(key.value)
            size += _check_node(value, path, sizes)
    if size > _NODES:
        raise UserError(f"{path}, line {node.start_mark.line + 1}: its aliases stand for more than {_NODES} values")
    sizes[id(node)] = size
    return size
