"""Single files that are written atomically; for folders see ``atomic_folder``."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Context manager: yields a hidden path next to ``path`` to write to, and renames it if the block raises no error.

    A reader sees either the old or the new file, never a partial one. After an error the old file stays. The data is
    not flushed to disk, so use ``training.checkpoints.Replacement`` for files that must survive a power failure.

    Raises:
        OSError: the file cannot be renamed.
    """
    scratch = path.with_name(f".{path.name}")
    try:
        yield scratch
        os.replace(scratch, path)
    finally:
        with suppress(OSError):
            scratch.unlink(missing_ok=True)
