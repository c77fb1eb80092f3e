"""Single files that are written atomically; for folders see ``atomic_folder``."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Context manager: yields a hidden path next to ``path`` to write to, and renames it if the block raises no error.

    A reader sees either the old or the new file, never a partial one. After an error the old file stays. A file that is
    there keeps its mode, and a link to it stays a link. The hidden path, ``.NAME.PID.partial``, is this process's own;
    those of processes that were killed are removed. The data is not flushed to disk, so use
    ``training.checkpoints.Replacement`` for files that must survive a power failure.

    Raises:
        OSError: the file cannot be renamed, or not be given the mode of the old one.
    """
    path = path.resolve()
    scratch = path.with_name(f".{path.name}.{os.getpid()}.partial")
    _remove_orphans(path)
    try:
        yield scratch
        if path.exists():
            shutil.copymode(path, scratch)
        os.replace(scratch, path)
    finally:
        with suppress(OSError):
            scratch.unlink(missing_ok=True)


def is_scratch(file: Path, path: Path) -> bool:
    """Whether ``file`` is what a process writes, or wrote when it was killed, to become ``path``."""
    before, after = f".{path.name}.", ".partial"
    return (
        file.name.startswith(before) and file.name.endswith(after) and file.name[len(before) : -len(after)].isdecimal()
    )


def _remove_orphans(path: Path) -> None:
    with suppress(OSError):  # the write itself says what is wrong with the folder
        for file in path.parent.iterdir():
            if is_scratch(file, path) and not _is_alive(int(file.name.split(".")[-2])):
                file.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        return True
    return True
