"""Checkpoints on disk: whether one is whole, and which is the newest whole one of a folder."""

import pickle
import zipfile
from pathlib import Path

import torch
from lightning.pytorch.utilities import rank_zero_warn


def newest_whole(folder: Path) -> Path | None:
    """The checkpoint with the most steps that is whole, by reading it; ``None`` if there is none.

    Broken ones that are newer are named in a warning.
    """
    found: list[tuple[int, float, Path]] = []
    for path in sorted(folder.glob("*.ckpt")) if folder.is_dir() else ():
        if (step := _step(path)) is not None:
            found.append((step, path.stat().st_mtime, path))
        else:
            rank_zero_warn(f"{path} is left out: {problem(path)}")
    for _, _, path in sorted(found, reverse=True):
        if (why := problem(path)) is None:
            return path
        rank_zero_warn(f"{path} is left out: {why}")
    return None


def problem(path: Path) -> str | None:
    """Why a checkpoint is not whole; ``None`` if it is. Reads all of it: the check sums that torch wrote must hold."""
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except (OSError, zipfile.BadZipFile, EOFError) as error:
        return f"it is cut off or no checkpoint ({error})"
    if broken is not None:
        return f"what it holds is damaged ({broken})"
    if _step(path) is None:
        return "it was not written by Lightning's Trainer"
    return None


def _step(path: Path) -> int | None:
    """Optimiser steps behind a checkpoint, without reading its tensors; ``None`` if it does not say."""
    try:
        content = torch.load(path, mmap=True, map_location="meta", weights_only=True)
        return int(content["global_step"])
    except (OSError, RuntimeError, EOFError, KeyError, TypeError, ValueError, pickle.UnpicklingError):
        return None
