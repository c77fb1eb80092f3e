"""Files that a run adds lines to, whatever a kill left of the last one."""

import os
from pathlib import Path

_BLOCK = 65_536  # bytes


def drop_cut_line(path: Path) -> None:
    """Remove a last line without its end: a process was killed while it wrote, and the next line would be glued to it.

    Nothing is lost: what a checkpoint has seen was written whole before it, and the resumed run writes the rest again.
    A file that does not exist is left alone.
    """
    if not path.is_file():
        return
    with path.open("rb+") as file:
        end = size = file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(end - _BLOCK, 0)
            file.seek(start)
            found = file.read(end - start).rfind(b"\n")
            if found >= 0:
                end = start + found + 1
                break
            end = start
        if end < size:
            file.truncate(end)
