"""The commands behind ``moa``."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moa_lightning.commands.errors import OneLineErrors


def run(command: str, args: list[str]) -> None:
    """Run one command; ``args`` starts with its name."""
    from moa_lightning.utils.console import quiet_libraries

    quiet_libraries()
    if str(Path.cwd()) not in sys.path:  # classes of your own, beside which you run moa; last, so as to hide nothing
        sys.path.append(str(Path.cwd()))
    if command in {"fit", "validate", "test", "predict"}:
        from moa_lightning.commands.fit.cli import AlignmentCLI

        AlignmentCLI.run_command(args)
    elif command == "demo":
        from moa_lightning.commands.demo.command import demo

        _call(demo, args)
    elif command == "sft":
        from moa_lightning.stages.supervised import supervised

        _call(supervised, args)
    elif command == "reward":
        from moa_lightning.stages.reward_model import reward_model

        _call(reward_model, args)
    elif command == "label":
        from moa_lightning.commands.label.command import LabelParser, label

        _call(label, args, LabelParser)
    elif command == "compare":
        from moa_lightning.commands.compare.command import compare

        _call(compare, _joined(args, "runs"))
    elif command == "combiners":
        from moa_lightning.commands.combiners.pages import combiners

        _call(combiners, args)
    else:
        from moa_lightning.commands.export.command import export

        _call(export, _named(args, "run", "output"))


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

    import yaml

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
    runs = [run for text in given for run in (yaml.safe_load(text) if text.startswith("[") else [text])]
    return [*others, f"--{name}={json.dumps(runs)}"]


def _call(function: Callable[..., None], args: list[str], parser: "type[OneLineErrors] | None" = None) -> None:
    from jsonargparse import auto_cli

    from moa_lightning.commands.errors import OneLineErrors, check_config_files

    check_config_files(args)
    auto_cli(
        function,
        args=args[1:],
        as_positional=False,
        parser_class=parser or OneLineErrors,
        prog=f"moa {args[0]}",
        allow_abbrev=False,
    )
