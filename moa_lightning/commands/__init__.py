"""The commands of ``moa``, in one list; what a command imports waits until it is run."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from moa_lightning.utils.console import quiet_libraries
from moa_lightning.utils.light_imports import import_lightning_for_help

_PACKAGE = "moa_lightning"
_PARSER = "commands.errors:OneLineErrors"


@dataclass(frozen=True)
class Command:
    """One of ``moa``'s commands. Paths are ``module:attribute`` in this package."""

    summary: str  # its line of ``moa --help``
    function: str  # its signature is the command line; with ``parser=None`` it takes the arguments themselves
    example: str  # what follows the command's name in the example of its help
    parser: str | None = _PARSER
    positional: Sequence[str] = ()  # options that may be given without their names
    repeatable: Sequence[str] = ()  # options that may be given several times, or once as a list
    loads_models: bool = True  # with Lightning and transformers


_CLI = "commands.fit.cli:AlignmentCLI.run_command"
_OF_A_RUN = "--config=runs/hh/config.yaml --ckpt_path=last"
COMMANDS = {
    "fit": Command("align a policy", _CLI, "--config=configs/demo.yaml", parser=None),
    "validate": Command("score a policy's responses to the validation prompts", _CLI, _OF_A_RUN, parser=None),
    "test": Command("score a policy's responses to the test prompts", _CLI, _OF_A_RUN, parser=None),
    "predict": Command("write responses with their scores as JSONL", _CLI, _OF_A_RUN, parser=None),
    "sft": Command(
        "build or fine-tune a policy on text (the supervised stage)",
        "stages.supervised:supervised",
        "--config=configs/hh/sft.yaml --data.path=train.jsonl",
    ),
    "reward": Command(
        "train a reward model on chosen/rejected pairs",
        "stages.reward_model:reward_model",
        "--config=configs/hh/reward.yaml --data.path=train.jsonl",
    ),
    "label": Command(
        "fill in preference labels that are missing, from rewards",
        "commands.label.command:label",
        "--config=label.yaml --data.path=train.jsonl --output=labelled.jsonl",
        parser="commands.label.command:LabelParser",
    ),
    "compare": Command(
        "put the objectives and thresholds of several runs side by side",
        "commands.compare.command:compare",
        "--runs='runs/*' --output=comparison",
        repeatable=("runs",),
        loads_models=False,
    ),
    "combiners": Command(
        "compare the ways N objectives become one, or print the page of one",
        "commands.combiners.pages:combiners",
        "--name=PAMA",
        loads_models=False,
    ),
    "export": Command(
        "write a run's policy as a plain Hugging Face folder",
        "commands.export.command:export",
        "runs/hh hh/aligned",
        positional=("run", "output"),
    ),
    "demo": Command(
        "the embedded task: several methods, one table, one picture",
        "commands.demo.command:demo",
        "--output=runs/demo",
    ),
}


def usage(name: str) -> str:
    """The first lines of a command's help. The parser's own usage names every option, and those follow below anyway."""
    return f"moa {name} [options]\nexample: moa {name} {COMMANDS[name].example}"


def run(name: str, args: list[str]) -> None:
    """Run one command; ``args`` starts with its name."""
    command = COMMANDS[name]
    shows_help = args[1:] in (["--help"], ["-h"])
    quiet_libraries(with_models=command.loads_models and not shows_help)
    if command.loads_models and shows_help:
        import_lightning_for_help()
    if str(Path.cwd()) not in sys.path:  # the user's classes in the working directory; last, so as to hide nothing
        sys.path.append(str(Path.cwd()))
    function = _load(command.function)
    if command.parser is None:
        function(args)
        return
    args = _named(args, *command.positional)
    for option in command.repeatable:
        args = _joined(args, option)
    _call(function, args, _load(command.parser))


def _load(path: str) -> Any:
    module, _, names = path.partition(":")
    found: Any = import_module(f"{_PACKAGE}.{module}")
    for name in names.split("."):
        found = getattr(found, name)
    return found


def _named(args: list[str], *names: str) -> list[str]:
    """The arguments with the first ones that have no name given these: ``export RUN DIR``."""
    left = [name for name in names if not any(a.partition("=")[0] == f"--{name}" for a in args)]
    named, is_value = args[:1], False
    for argument in args[1:]:
        free = not argument.startswith("-") and not is_value
        is_value = argument.startswith("--") and "=" not in argument
        named.append(f"--{left.pop(0)}={argument}" if free and left else argument)
    return named


def _joined(args: list[str], name: str) -> list[str]:
    """The arguments with an option that is given several times as one list: the parser would keep the last alone."""
    import json

    given: list[str] = []
    others, is_value = args[:1], False
    for argument in args[1:]:
        flag, _, value = argument.partition("=")
        if is_value or (flag == f"--{name}" and "=" in argument):
            given.append(argument if is_value else value)
        elif argument != f"--{name}":
            others.append(argument)
        is_value = argument == f"--{name}" and not is_value
    if len(given) < 2:
        return args
    return [*others, f"--{name}={json.dumps([value for text in given for value in _values(text)])}"]


def _values(text: str) -> list[Any]:
    """Those of a list; other text is one value, such as the pattern ``[ab]-run``."""
    import yaml

    try:
        values = yaml.safe_load(text) if text.startswith("[") else None
    except yaml.YAMLError:
        values = None
    return values if isinstance(values, list) else [text]


def _call(function: Callable[..., None], args: list[str], parser: Any) -> None:
    from jsonargparse import auto_cli

    from moa_lightning.commands.errors import check_config_files

    check_config_files(args)
    auto_cli(
        function,
        args=args[1:],
        as_positional=False,
        parser_class=parser,
        prog=f"moa {args[0]}",
        usage=usage(args[0]),
        allow_abbrev=False,
    )
