"""Output folders that are whole or not there at all."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def refuse_used(output: str | Path, overwrite: bool) -> None:
    """Refuse a folder that holds something, before any work is done for it.

    Raises:
        ValueError: ``output`` is not empty and ``overwrite`` is off.
    """
    target = Path(output).expanduser()
    if target.exists() and (not target.is_dir() or any(target.iterdir())) and not overwrite:
        raise ValueError(f"'{output}' is not empty; choose another folder, or set --overwrite=true")


@contextmanager
def whole_folder(output: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Give a folder to write into, and move it to ``output`` in one step when the block ends without an error.

    Raises:
        ValueError: ``output`` is not empty and ``overwrite`` is off.
    """
    refuse_used(output, overwrite)
    target = Path(output).expanduser()
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    try:
        finished = scratch / "finished"
        finished.mkdir()
        yield finished
        if target.exists():
            shutil.rmtree(target)
        finished.rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
