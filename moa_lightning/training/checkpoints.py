"""Checkpoints on disk: written whole or not at all, checked before a run goes on from one, found by step."""

import math
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_warn

from moa_lightning.distributed.shards import ForeignContentError, stored_shards
from moa_lightning.errors import UserError
from moa_lightning.utils.non_finite import NonFiniteError, names_of_non_finite, some

META = "meta.pt"
"""What a checkpoint in pieces holds besides the pieces; Lightning's name for it."""


_UNREADABLE = (OSError, RuntimeError, EOFError, KeyError, TypeError, ValueError, pickle.UnpicklingError)
_WEIGHTS = "state_dict."  # what the names of weights in a sharded checkpoint begin with
_FORMER = "former"  # of a checkpoint that was put aside for the one that replaces it


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning plugin: a checkpoint appears once it is whole and on the disk, and is checked before it is loaded.

    It is written beside its place without a second copy in memory, flushed, and moved there. Where writing fails, what
    was there before stays. Remote paths are left to Lightning.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write it.

        Raises:
            UserError: one line with why it could not be written, such as a disk that is full.
        """
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        replacement = Replacement(Path(path))
        try:
            with explained(replacement.target, bytes_of(checkpoint)):
                replacement.prepare()
                save_file(checkpoint, replacement.path)
                replacement.commit()
        finally:
            replacement.clear()

    def load_checkpoint(
        self,
        path: Any,
        map_location: Callable[..., Any] | None = lambda storage, loc: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read it.

        Raises:
            UserError: it is not whole, with the newest that is; or it is a folder, which strategies read themselves.
        """
        if "://" not in str(path):
            require_valid(Path(path))
            if Path(path).is_dir():
                raise UserError(
                    f"checkpoint {path} is in pieces, which this strategy does not put together; use strategy "
                    "FSDP2Strategy (configs/trainer/fsdp.yaml), or start from what moa export makes of it"
                )
        content: dict[str, Any] = super().load_checkpoint(path, map_location, weights_only)
        return content

    def remove_checkpoint(self, path: Any) -> None:
        """Remove it at once: what is half removed is not where checkpoints are looked for."""
        if "://" in str(path):
            super().remove_checkpoint(path)
            return
        hidden = _beside(Path(path), "removed")
        _remove(hidden)  # the half of one that a run left that was killed while it removed it
        if Path(path).is_dir():
            os.replace(path, hidden)
            _remove(hidden)
        else:
            super().remove_checkpoint(path)


class Replacement:
    """Something written beside its place, and moved there when all of it is on the disk.

    Args:
        target: its place: a file or folder, where one may be already.
    """

    def __init__(self, target: Path) -> None:
        self.target, self.path = target, _beside(target, "partial")

    def prepare(self, folder: bool = False) -> None:
        """Make room for it; a folder is made."""
        self.clear()  # what a run left that was killed while it wrote
        (self.path if folder else self.path.parent).mkdir(parents=True, exist_ok=True)

    def commit(self) -> None:
        """Flush it and move it to its place."""
        for written in [*self.path.rglob("*"), self.path]:
            _flush(written)
        former = _beside(self.target, _FORMER)
        _remove(former)
        if self.target.is_dir() or (self.path.is_dir() and self.target.exists()):  # no folder is replaced at a stroke
            os.replace(self.target, former)
        os.replace(self.path, self.target)
        _flush(self.target.parent)
        _remove(former)

    def clear(self) -> None:
        """Remove what was written beside the place, as far as the disk allows."""
        with suppress(OSError):
            _remove(self.path)


def save_file(content: Any, path: Path) -> None:
    """``torch.save`` into a file of Python's: given a path, it says nothing of why it could not write."""
    with path.open("wb") as file:
        torch.save(content, file)


@contextmanager
def explained(target: Path, size: int) -> Iterator[None]:
    """Within it a failure to write is told in one line, with the bytes that were to be written and those that are free.

    Raises:
        UserError: instead of the ``OSError``, wherever torch has hidden it.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause = next((e for e in _chain(error) if isinstance(e, OSError)), None)
        if cause is None:
            raise
        folder = next(folder for folder in target.absolute().parents if folder.is_dir())
        free = shutil.disk_usage(folder).free
        raise UserError(
            f"checkpoint {target} could not be written: {cause.strerror or cause}; it takes {size / 2**20:.1f} MiB, "
            f"and {free / 2**20:.1f} MiB are free there. Earlier checkpoints are untouched: make room, or change "
            "checkpoint.dirpath, and go on with --ckpt_path=last"
        ) from error


def newest_valid(folder: Path, known_broken: Path | None = None, before: float = math.inf) -> Path | None:
    """The checkpoint with the most steps that is whole, by reading it; ``None`` if there is none.

    One that was put aside to be replaced counts too: a run may have been killed at that moment. Broken ones that are
    newer are named in a warning, but for the one that is known already.

    Args:
        folder: where they are.
        known_broken: not to be named.
        before: only those of fewer steps.
    """
    found = [(steps_of(path), path) for path in _files_of(folder)]
    for path in [path for step, path in found if step is None and path != known_broken]:
        rank_zero_warn(f"{path} is left out: {problem(path)}")
    for path in by_steps(folder, before):
        if (why := problem(path)) is None:
            return path
        if path != known_broken:
            rank_zero_warn(f"{path} is left out: {why}")
    return None


def by_steps(folder: Path, before: float = math.inf) -> list[Path]:
    """The checkpoints in a folder, the one with the most steps first, as far as they say; of equals the later file.

    Which one is the newest goes by this rule everywhere: ``last.ckpt`` may be older than another one, where a run was
    killed between the two files of a step.

    Args:
        folder: where they are; it need not exist.
        before: only those of fewer steps.
    """
    known = []
    for path in _files_of(folder):
        with suppress(FileNotFoundError):  # a run that is in progress has replaced it meanwhile
            if (step := steps_of(path)) is not None:
                known.append((step, path.stat().st_mtime, path))
    return [path for step, _, path in sorted(known, reverse=True) if step < before]


def _files_of(folder: Path) -> list[Path]:
    return sorted([*folder.glob("*.ckpt"), *folder.glob(_beside(Path("*.ckpt"), _FORMER).name)])


def require_valid(path: Path) -> None:
    """Nothing if a checkpoint is whole.

    Raises:
        UserError: one line that names it and the newest whole one in its folder.
    """
    if (why := problem(path)) is None:
        return
    other = newest_valid(path.parent, known_broken=path)
    offer = f"the newest whole one beside it is {other}" if other else "there is no whole one beside it"
    raise UserError(f"checkpoint {path} cannot be used: {why}; {offer}")


def require_finite(weights: Mapping[str, torch.Tensor], path: Path) -> None:
    """Nothing if weights that were read from a checkpoint are finite.

    Raises:
        NonFiniteError: one line that names it and one of them.
    """
    if bad := names_of_non_finite(weights):
        raise NonFiniteError(f"checkpoint {path} cannot be used: its weights are not finite ({some(bad)})")


def problem(path: Path) -> str | None:
    """Why a checkpoint is not valid; ``None`` if it is. Reads all of it.

    The check sums that torch wrote must hold, and the weights must be finite.
    """
    try:
        found = [file.stat() for file in ([path, *path.iterdir()] if path.is_dir() else [path])]
    except FileNotFoundError:
        return "there is no such file (a run in progress removes those that it replaces)"
    return _problem(path, tuple(file.st_mtime_ns for file in found), tuple(file.st_size for file in found))


@lru_cache
def _problem(path: Path, times: tuple[int, ...], sizes: tuple[int, ...]) -> str | None:
    """Read once, as long as the files stay as they are."""
    bad: list[str] = []
    try:
        if path.is_dir():
            broken = _damaged(path / META)
            if broken is None:
                broken, bad = _check_shards(path)
        else:
            broken = _damaged(path)
    except ForeignContentError as error:
        return f"it could run code, so it was not opened: {error}"
    except (OSError, zipfile.BadZipFile, EOFError, pickle.UnpicklingError) as error:
        return f"it is cut off or no checkpoint ({' '.join(str(error).split())})"
    if broken is not None:
        return f"what it holds is damaged ({broken})"
    try:
        _global_step(path)
    except ForeignContentError as error:
        return f"it could run code, so it was not opened: {error}"
    except _UNREADABLE:
        return "it was not written by Lightning's Trainer"
    if bad := bad or ([] if path.is_dir() else _non_finite(path)):
        return f"its weights are not finite ({some(bad)})"
    return None


def _non_finite(file: Path) -> list[str]:
    """Weights that are NaN or infinite, as an earlier version could write them."""
    weights = torch.load(file, mmap=True, map_location="cpu", weights_only=True).get("state_dict", {})
    return names_of_non_finite(weights)


def _damaged(file: Any) -> str | None:
    """The first part of what torch.save wrote whose check sum does not hold."""
    with zipfile.ZipFile(file) as archive:
        return archive.testzip()


def _check_shards(folder: Path) -> tuple[str | None, list[str]]:
    """The first file with a damaged shard, and the weights that are NaN or infinite. Each shard is read once.

    Raises:
        ForeignContentError: a weight's shard holds something else.
    """
    bad = []
    for name, file_name, offset, length in stored_shards(folder):
        with (folder / file_name).open("rb") as file:
            file.seek(offset)
            content = BytesIO(file.read(length))
        if _damaged(content) is not None:
            return file_name, []
        if name.startswith(_WEIGHTS):
            content.seek(0)
            try:
                shard = torch.load(content, map_location="cpu", weights_only=True)
            except pickle.UnpicklingError as error:
                raise ForeignContentError(f"'{name}' is more than a tensor") from error
            bad += names_of_non_finite({name.removeprefix(_WEIGHTS): shard}) if isinstance(shard, torch.Tensor) else []
    return None, list(dict.fromkeys(bad))


def steps_of(path: Path) -> int | None:
    """Optimiser steps behind a checkpoint, without reading its tensors; ``None`` if it does not say."""
    try:
        return _global_step(path)
    except _UNREADABLE:
        return None


def settings_in(path: Path) -> dict[str, Any]:
    """The settings under which a valid checkpoint was written, nested; empty if it does not say."""
    found: dict[str, Any] = _head(path).get("moa", {}).get("settings", {})
    return found


def _global_step(path: Path) -> int:
    return int(_head(path)["global_step"])


def _head(path: Path) -> dict[str, Any]:
    """All but the content of tensors."""
    file = path / META if path.is_dir() else path
    try:
        content: dict[str, Any] = torch.load(file, mmap=True, map_location="meta", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ForeignContentError(f"{file.name} holds more than tensors and plain data") from error
    return content


def bytes_of(content: Any) -> int:
    """Of all tensors in plain containers."""
    if isinstance(content, torch.Tensor):
        return content.numel() * content.element_size()
    children = content.values() if isinstance(content, Mapping) else content
    return sum(bytes_of(child) for child in children) if isinstance(content, Mapping | list | tuple) else 0


def _beside(path: Path, state: str) -> Path:
    return path.with_name(f".{path.name}.{state}")


def _flush(path: Path) -> None:
    """Have the system write a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():  # Lightning's last.ckpt may be a link
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what led to it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
