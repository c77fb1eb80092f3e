"""Single files that are whole or not there at all; for folders see ``atomic_folder``."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Context manager: give a hidden path beside ``path`` to write to, and move it there when the block ends.

    A reader sees the old file or the new one, and never a part. After an error the old file stays. The data is not
    flushed to the disk: what must outlast a power cut is a checkpoint (``training.checkpoints.Replacement``).

    Raises:
        OSError: the file cannot be moved to its place.
    """
    scratch = path.with_name(f".{path.name}")
    try:
        yield scratch
        os.replace(scratch, path)
    finally:
        with suppress(OSError):
            scratch.unlink(missing_ok=True)
