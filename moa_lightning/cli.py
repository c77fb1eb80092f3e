"""The command line: LightningCLI for training and evaluation, plain functions for the other commands.

torch and other slow imports wait until the command is known, so that ``moa --help`` is fast.
"""

import os
import site
import sys
import sysconfig
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

from moa_lightning.commands import COMMANDS, run
from moa_lightning.errors import UserError
from moa_lightning.utils.console import is_main_process, launched_as

PACKAGE = Path(__file__).resolve().parent

_SECONDS_TO_BE_SECOND = 3
_PEER = "This process lost contact: another process has ended, and its message, above or in its log, says why."
_DEFECT = (
    "This is a defect of moa-lightning, not a mistake of yours. Please report it on the project page, with this "
    "traceback, the command and the output of 'moa --version'."
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run ``moa``. A mistake of the user prints one line and exits with code 2."""
    args = list(sys.argv[1:] if arguments is None else arguments)
    if not args or args[0] in {"-h", "--help"}:
        print(_overview())
        return
    if args[0] == "--version":
        from moa_lightning import __version__

        print(f"moa {__version__}")
        return
    command = next((a for a in args if not a.startswith("-")), "")
    if command not in COMMANDS or args[0] != command:
        _fail(f"the first argument must be a command, one of {', '.join(COMMANDS)}; got '{args[0]}'")
    try:
        run(command, args)
    except Exception as error:
        mistake = next((cause for cause in _causes(error) if isinstance(cause, UserError)), None)
        if mistake is None and _in_a_collective(error):
            error.add_note(_PEER)
        elif mistake is None and _is_ours(error):
            error.add_note(_DEFECT)
        if os.environ.get("MOA_DEBUG") or mistake is None:
            raise
        _fail(str(mistake), shared=mistake.shared, cause=mistake.__cause__ if mistake.shows_cause else None)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error, then its causes: the parser wraps errors that a class raises about its fields."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__


def _in_a_collective(error: BaseException) -> bool:
    """Whether torch raised the error in a collective, usually because another process has ended."""
    frames = traceback.extract_tb(error.__traceback__)
    return isinstance(error, RuntimeError) and any("/torch/distributed/" in frame.filename for frame in frames)


def _is_ours(error: BaseException) -> bool:
    """Whether a bug is in this package, and not in user code such as a custom combiner or callback.

    It is if the last frame outside of libraries is this package's.
    """
    libraries = [Path(folder).resolve() for folder in {*sysconfig.get_paths().values(), *site.getsitepackages()}]
    ours = (PACKAGE, (PACKAGE / "callbacks").resolve())
    files = [Path(frame.filename).resolve() for frame in traceback.extract_tb(error.__traceback__)]
    for file in reversed(files):
        if any(file.is_relative_to(folder) for folder in ours):
            return True
        if not any(file.is_relative_to(folder) for folder in libraries) and file.exists():
            return False
    return True


def _fail(message: str, shared: bool = False, cause: BaseException | None = None) -> None:
    """Exit with one line, and with the traceback of a cause in user code.

    If several processes fail with the same message, rank 0 prints it.
    """
    rank = launched_as()
    if rank:
        # If rank 0 fails too, the launcher stops the others with it. If it continues, only this process has failed.
        time.sleep(_SECONDS_TO_BE_SECOND)
        message = message if shared else f"rank {rank}: {message}"
    if is_main_process(rank) or not shared:
        print(f"moa: error: {' '.join(message.splitlines())}", file=sys.stderr)
        if cause is not None:
            traceback.print_exception(cause)
    raise SystemExit(2)


def _overview() -> str:
    lines = ["usage: moa COMMAND [options]", "", "Multi-objective alignment of language models.", ""]
    lines += [f"  {name:<10}{command.summary}" for name, command in COMMANDS.items()]
    return "\n".join([*lines, "", "'moa COMMAND --help' lists a command's options."])


if __name__ == "__main__":
    main()
