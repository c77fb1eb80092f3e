"""Output folders that are whole or not there at all."""

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from moa_lightning.errors import UserError

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)


def refuse_used(output: str | Path, overwrite: bool) -> None:
    """Refuse a folder that holds something, before any work is done for it.

    Raises:
        UserError: ``output`` is not empty and ``overwrite`` is off.
    """
    target = Path(output).expanduser()
    if target.exists() and (not target.is_dir() or any(target.iterdir())) and not overwrite:
        raise UserError(f"'{output}' is not empty; choose another folder, or set --overwrite=true")


@contextmanager
def atomic_folder(output: str | Path, overwrite: bool = False, only_writer: bool = False) -> Iterator[Path]:
    """Give a folder to write into, and move it to ``output`` when the block ends without an error.

    What is there already stays until then: a killed process leaves it, and its own half beside it in a hidden folder.

    Args:
        output: the folder.
        overwrite: it may hold something.
        only_writer: no other process writes to ``output``, so that hidden halves are those of killed ones, and go.

    Raises:
        UserError: ``output`` is not empty and ``overwrite`` is off, or it cannot be written, such as a full disk.
    """
    refuse_used(output, overwrite)
    target = Path(output).expanduser()
    with _writable(output):
        target.parent.mkdir(parents=True, exist_ok=True)
        if only_writer:
            for half in target.parent.glob(f".{target.name}-*"):
                shutil.rmtree(half)
        scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    try:
        finished = scratch / "finished"
        finished.mkdir()
        with _writable(output):
            yield finished
        _open_to_all(finished)
        if target.exists():  # two renames, each in one step: never half a folder under the name
            target.rename(scratch / "before")
        finished.rename(target)
    finally:
        if not target.exists() and (scratch / "before").exists():
            (scratch / "before").rename(target)
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def _writable(output: str | Path) -> Iterator[None]:
    """Within it a full disk, a quota or a folder without permission is one line."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        found = re.search(r"os error (\d+)", str(error))  # safetensors' own errors have no number
        number = int(found[1]) if found else getattr(error, "errno", None)
        if number not in _NO_ROOM:
            raise
        raise UserError(f"'{output}' cannot be written: {os.strerror(number)}; nothing is left of it") from error


def _open_to_all(folder: Path) -> None:
    """Give files the permissions of the folder: safetensors leaves its own to the owner alone."""
    mode = folder.stat().st_mode & 0o666
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(mode)
