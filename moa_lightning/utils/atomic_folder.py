"""Output folders that are written atomically."""

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
    """Refuse a folder that is not empty, before any work is done.

    Raises:
        UserError: ``output`` is not empty and ``overwrite`` is off.
    """
    target = Path(output).expanduser()
    if target.exists() and (not target.is_dir() or any(target.iterdir())) and not overwrite:
        raise UserError(f"'{output}' is not empty; choose another folder, or set --overwrite=true")


@contextmanager
def atomic_folder(output: str | Path, overwrite: bool = False, only_writer: bool = False) -> Iterator[Path]:
    """Context manager: yields a folder to write into, and renames it to ``output`` if the block raises no error.

    An existing ``output`` stays until then. A killed process leaves it unchanged, and its own partial output in a
    hidden folder next to it.

    Args:
        output: the folder.
        overwrite: whether ``output`` may have content, which is replaced.
        only_writer: no other process writes to ``output``; partial output that killed processes left is removed.

    Raises:
        UserError: ``output`` is not empty and ``overwrite`` is off, or it cannot be written (a full disk, …).
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
        if target.exists():  # two atomic renames, so the target is never a partial folder
            target.rename(scratch / "before")
        finished.rename(target)
    finally:
        if not target.exists() and (scratch / "before").exists():
            (scratch / "before").rename(target)
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def _writable(output: str | Path) -> Iterator[None]:
    """Context manager: a full disk, an exceeded quota or a missing permission is raised as one line."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        found = re.search(r"os error (\d+)", str(error))  # safetensors' own errors have no number
        number = int(found[1]) if found else getattr(error, "errno", None)
        if number not in _NO_ROOM:
            raise
        raise UserError(f"'{output}' cannot be written: {os.strerror(number)}; partial output was removed") from error


def _open_to_all(folder: Path) -> None:
    """Give files the permissions of the folder: safetensors creates files that only the owner can read."""
    mode = folder.stat().st_mode & 0o666
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(mode)
