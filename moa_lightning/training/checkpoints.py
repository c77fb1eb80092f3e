"""Checkpoints on disk: written atomically, verified before a run resumes from one, found by step."""

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
"""File of a sharded checkpoint with everything but the shards; the name is Lightning's."""


_UNREADABLE = (OSError, RuntimeError, EOFError, KeyError, TypeError, ValueError, pickle.UnpicklingError)
_WEIGHTS = "state_dict."  # prefix of the names of weights in a sharded checkpoint
_FORMER = "former"  # state of a checkpoint that has been moved aside for its replacement


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning plugin that writes checkpoints atomically and verifies them before it loads them.

    It writes a hidden file next to the target without a second copy in memory, flushes it to disk, and renames it. If
    writing fails, the previous checkpoint stays. Remote paths are left to Lightning.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write a checkpoint atomically.

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
        """Verify and read a checkpoint.

        Raises:
            UserError: it is not valid, with the newest one that is; or it is sharded, which strategies read themselves.
        """
        if "://" not in str(path):
            require_valid(Path(path))
            if Path(path).is_dir():
                raise UserError(
                    f"checkpoint {path} is sharded, and this strategy cannot load sharded checkpoints; use strategy "
                    "FSDP2Strategy (configs/trainer/fsdp.yaml), or start from the policy that moa export writes from it"
                )
        content: dict[str, Any] = super().load_checkpoint(path, map_location, weights_only)
        return content

    def remove_checkpoint(self, path: Any) -> None:
        """Remove a checkpoint. A folder is renamed first, so that half of one is never taken for a checkpoint."""
        if "://" in str(path):
            super().remove_checkpoint(path)
            return
        hidden = _beside(Path(path), "removed")
        _remove(hidden)  # left by a run that was killed while it removed a checkpoint
        if Path(path).is_dir():
            os.replace(path, hidden)
            _remove(hidden)
        else:
            super().remove_checkpoint(path)


class Replacement:
    """A file or folder that is written next to its target, and renamed to it once it is on the disk.

    Args:
        target: the final path, which may exist.
    """

    def __init__(self, target: Path) -> None:
        self.target, self.path = target, _beside(target, "partial")

    def prepare(self, folder: bool = False) -> None:
        """Remove a partial file that a killed run left, and create the folder to write into."""
        self.clear()
        (self.path if folder else self.path.parent).mkdir(parents=True, exist_ok=True)

    def commit(self) -> None:
        """Flush what was written to disk and rename it to the target."""
        for written in [*self.path.rglob("*"), self.path]:
            _flush(written)
        former = _beside(self.target, _FORMER)
        _remove(former)
        if self.target.is_dir() or (self.path.is_dir() and self.target.exists()):  # a rename cannot replace a folder
            os.replace(self.target, former)
        os.replace(self.path, self.target)
        _flush(self.target.parent)
        _remove(former)

    def clear(self) -> None:
        """Remove the partial file or folder; errors are ignored."""
        with suppress(OSError):
            _remove(self.path)


def save_file(content: Any, path: Path) -> None:
    """``torch.save`` into an open file: given a path, torch hides the reason of a failure to write."""
    with path.open("wb") as file:
        torch.save(content, file)


@contextmanager
def explained(target: Path, size: int) -> Iterator[None]:
    """Context manager: a failure to write is raised as one line, with the required and the free space.

    Args:
        target: the checkpoint that is written.
        size: bytes to write.

    Raises:
        UserError: in place of the ``OSError``, even if torch has wrapped it.
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
            "checkpoint.dirpath, and resume with --ckpt_path=last"
        ) from error


def newest_valid(folder: Path, known_broken: Path | None = None, before: float = math.inf) -> Path | None:
    """The valid checkpoint with the most steps, found by reading them; ``None`` if there is none.

    A checkpoint that was moved aside to be replaced counts too: a run may have been killed at that moment. Invalid
    checkpoints that are newer are named in a warning, except for ``known_broken``.

    Args:
        folder: of the checkpoints.
        known_broken: not named in a warning.
        before: only checkpoints with fewer steps.
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
    """The checkpoints in a folder by descending steps, and by descending file time for equal steps.

    Checkpoints that do not hold their step are left out. This order decides everywhere which checkpoint is the newest:
    ``last.ckpt`` may be older than another one if a run was killed between the two files of a step.

    Args:
        folder: of the checkpoints; it need not exist.
        before: only checkpoints with fewer steps.
    """
    known = []
    for path in _files_of(folder):
        with suppress(FileNotFoundError):  # a running process has replaced it meanwhile
            if (step := steps_of(path)) is not None:
                known.append((step, path.stat().st_mtime, path))
    return [path for step, _, path in sorted(known, reverse=True) if step < before]


def _files_of(folder: Path) -> list[Path]:
    return sorted([*folder.glob("*.ckpt"), *folder.glob(_beside(Path("*.ckpt"), _FORMER).name)])


def require_valid(path: Path) -> None:
    """Refuse a checkpoint that is not valid.

    Raises:
        UserError: one line with the reason and the newest valid checkpoint in its folder.
    """
    if (why := problem(path)) is None:
        return
    other = newest_valid(path.parent, known_broken=path)
    offer = f"the newest valid checkpoint in its folder is {other}" if other else "its folder has no valid checkpoint"
    raise UserError(f"checkpoint {path} cannot be used: {why}; {offer}")


def require_finite(weights: Mapping[str, torch.Tensor], path: Path) -> None:
    """Refuse weights from a checkpoint that are NaN or infinite.

    Raises:
        NonFiniteError: one line with the checkpoint and one of the weights.
    """
    if bad := names_of_non_finite(weights):
        raise NonFiniteError(f"checkpoint {path} cannot be used: its weights are not finite ({some(bad)})")


def problem(path: Path) -> str | None:
    """Why a checkpoint is not valid; ``None`` if it is. Reads all of it.

    A valid checkpoint has the checksums that torch wrote, and finite weights.
    """
    try:
        found = [file.stat() for file in ([path, *path.iterdir()] if path.is_dir() else [path])]
    except FileNotFoundError:
        return "there is no such file (a run in progress removes checkpoints that it replaces)"
    return _problem(path, tuple(file.st_mtime_ns for file in found), tuple(file.st_size for file in found))


@lru_cache
def _problem(path: Path, times: tuple[int, ...], sizes: tuple[int, ...]) -> str | None:
    """:func:`problem`, cached until the files change."""
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
        return f"it is truncated or not a checkpoint ({' '.join(str(error).split())})"
    if broken is not None:
        return f"its content is damaged ({broken})"
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
    """Names of weights that are NaN or infinite; earlier versions could write them."""
    weights = torch.load(file, mmap=True, map_location="cpu", weights_only=True).get("state_dict", {})
    return names_of_non_finite(weights)


def _damaged(file: Any) -> str | None:
    """The first record in a file of ``torch.save`` with a wrong checksum; ``None`` if there is none."""
    with zipfile.ZipFile(file) as archive:
        return archive.testzip()


def _check_shards(folder: Path) -> tuple[str | None, list[str]]:
    """The first file with a damaged shard, and names of weights that are NaN or infinite. Each shard is read once.

    Raises:
        ForeignContentError: the shard of a weight is not a tensor.
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
    """Number of optimiser steps of a checkpoint, without reading its tensors; ``None`` if it does not hold it."""
    try:
        return _global_step(path)
    except _UNREADABLE:
        return None


def settings_in(path: Path) -> dict[str, Any]:
    """The nested settings that a valid checkpoint was written with; empty if it does not hold them."""
    found: dict[str, Any] = _head(path).get("moa", {}).get("settings", {})
    return found


def _global_step(path: Path) -> int:
    return int(_head(path)["global_step"])


def _head(path: Path) -> dict[str, Any]:
    """A checkpoint without the content of its tensors, which are on the meta device."""
    file = path / META if path.is_dir() else path
    try:
        content: dict[str, Any] = torch.load(file, mmap=True, map_location="meta", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ForeignContentError(f"{file.name} holds more than tensors and plain data") from error
    return content


def bytes_of(content: Any) -> int:
    """Total size in bytes of the tensors in nested plain containers."""
    if isinstance(content, torch.Tensor):
        return content.numel() * content.element_size()
    children = content.values() if isinstance(content, Mapping) else content
    return sum(bytes_of(child) for child in children) if isinstance(content, Mapping | list | tuple) else 0


def _beside(path: Path, state: str) -> Path:
    return path.with_name(f".{path.name}.{state}")


def _flush(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk."""
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
    """Yield an error, then its causes or contexts."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
