"""Files of an observer on a disk that is full or read-only, or in a folder that somebody removed."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_warn


class Writing:
    """Lets a run continue where a file of one observer cannot be written: it warns once, until it works again."""

    def __init__(self) -> None:
        self._warned = False

    @contextmanager
    def attempt(self, path: Path) -> Iterator[None]:
        """Context manager around the writing of a file; an ``OSError`` inside becomes a warning."""
        try:
            yield
        except OSError as error:
            if not self._warned:
                rank_zero_warn(f"{path} cannot be written: {reason(error)}; the run continues without it")
            self._warned = True
        else:
            self._warned = False


def reason(error: OSError) -> str:
    """What the system said, in a few words."""
    return error.strerror or (os.strerror(error.errno) if error.errno else type(error).__name__)
