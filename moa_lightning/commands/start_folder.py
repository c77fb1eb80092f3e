"""Which folder a run works in, and where its checkpoints are."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from moa_lightning.errors import UserError
from moa_lightning.training.checkpoints import META, newest_valid, settings_in, steps_of
from moa_lightning.training.run_checkpoint import checkpoint_folder
from moa_lightning.training.run_lock import holder_of

_RECORD = "config.yaml"
_HEADER = "# lightning.pytorch=="  # the first line of what Lightning's CLI saves
_OURS = (
    _RECORD,
    "checkpoints",
    "front.csv",
    "front.png",
    "metrics.csv",
    "non_finite.ckpt",
    "policy",
    "samples.jsonl",
    "summary.json",
)
_LEFT_BY_A_RUN = ("checkpoints", "summary.json", "metrics.csv")


@dataclass(frozen=True)
class RunPlace:
    """A run's folder, and its ``checkpoint.dirpath``.

    Args:
        root: the folder.
        dirpath: of its checkpoints, where that is not ``checkpoints/`` in it.
    """

    root: Path
    dirpath: str | None = None

    @property
    def checkpoints(self) -> Path:
        """Where its checkpoints are."""
        return checkpoint_folder(self.root, self.dirpath)

    def moved_to(self, root: Path) -> "RunPlace":
        """The same run in another folder; checkpoints that lay in the former one moved with it."""
        before, dirpath = self.root.absolute(), self.dirpath
        if dirpath and Path(dirpath).expanduser().absolute().is_relative_to(before):
            dirpath = str(root / Path(dirpath).expanduser().absolute().relative_to(before))
        return RunPlace(root, dirpath)

    def newest(self) -> Path | None:
        """The checkpoint with the most steps that is valid."""
        return newest_valid(self.checkpoints)


def settings_of(root: Path) -> dict[str, Any]:
    """The record of the run in a folder; empty if none of ours is there."""
    file = root / _RECORD
    try:
        text = file.read_text(encoding="utf-8") if file.is_file() else ""
        settings = yaml.safe_load(text) if text.startswith(_HEADER) else None
    except (UnicodeDecodeError, yaml.YAMLError):
        return {}
    if not isinstance(settings, dict) or "trainer" not in settings or "objectives" not in (settings.get("model") or {}):
        return {}
    return settings


def is_run(root: Path) -> bool:
    """Whether a folder holds the record of a run."""
    return bool(settings_of(root))


def place_of(given: RunPlace, configs: Sequence[Path]) -> RunPlace:
    """Where a run that is called with these config files lies now.

    The ``config.yaml`` in a run's folder means that run, also after the folder was moved, or from another working
    directory, from which the recorded folder is not found.

    Args:
        given: by the settings.
        configs: the config files, the last one last.
    """
    for file in reversed(configs):
        root = file.absolute().parent
        if file.name != _RECORD or not any((root / name).exists() for name in _LEFT_BY_A_RUN):
            continue
        recorded = settings_of(root)
        moved = root.resolve() != given.root.resolve()
        if moved and recorded and recorded["trainer"].get("default_root_dir") == str(given.root):
            return given.moved_to(file.parent)
        return given
    return given


def run_of(checkpoint: Path) -> Path | None:
    """The run folder that a checkpoint lies in, if it lies in one."""
    return next((folder for folder in checkpoint.absolute().parents[:2] if is_run(folder)), None)


def refuse_no_checkpoint(path: Path) -> None:
    """Nothing if there is a checkpoint at a path: a file, or a folder that holds a sharded one.

    Raises:
        UserError: one line.
    """
    if not path.exists():
        raise UserError(f"ckpt_path: '{path}' does not exist; a run keeps them in checkpoints/")
    if path.is_dir() and not (path / META).exists():
        inside = " of the run in it (ckpt_path: last finds the newest)" if is_run(path) else ""
        raise UserError(f"ckpt_path: '{path}' is a folder and no checkpoint; name a checkpoint{inside}")


def refuse_other_run(checkpoint: Path, root: Path) -> None:
    """Nothing if a run may continue in a folder from a checkpoint that lies in no run's folder.

    It may where the folder holds no run, or surely the one that wrote the checkpoint: the checkpoint lies where that
    run keeps them, or names the folder by its whole path. A relative path would name a folder in any working directory.

    Args:
        checkpoint: a valid one.
        root: the folder.

    Raises:
        UserError: one line with the checkpoint's run and the folder's.
    """
    if not (record := settings_of(root)):
        return
    recorded = RunPlace(Path(record["trainer"]["default_root_dir"]), (record.get("checkpoint") or {}).get("dirpath"))
    if recorded.moved_to(root).checkpoints.resolve() == checkpoint.absolute().parent.resolve():
        return
    its = (settings_in(checkpoint).get("trainer") or {}).get("default_root_dir")
    if its is not None and Path(its).is_absolute() and Path(its).resolve() == root.resolve():
        return
    of = "does not name its run" if its is None else f"was written by the run in '{its}'"
    raise UserError(
        f"ckpt_path: {checkpoint} lies in no run's folder and {of}, and '{root}' holds a run, which would be written "
        "over: give a new folder with --trainer.default_root_dir, or, if the checkpoint is of the run there, move it "
        f"to {recorded.moved_to(root).checkpoints}"
    )


def run_in_progress(checkpoint: Path, root: Path, folder: Path) -> str | None:
    """One line for an evaluation of a checkpoint whose run is still in progress; ``None`` where it is not.

    Args:
        checkpoint: what is evaluated.
        root: folder of the run.
        folder: where the evaluation writes.
    """
    if (holder := holder_of(root)) is None:
        return None
    return (
        f"the run in {root} is in progress (process {holder.pid} on host {holder.host}): this is of step "
        f"{steps_of(checkpoint)}, from {checkpoint}, and writes to {folder} alone"
    )


def free_folder(root: Path) -> Path:
    """``root`` if there is nothing in it, else the first of ``root-2``, ``root-3``, … of which that is so.

    Raises:
        UserError: it is a file, or it has something in it and no name that a number can be added to.
    """
    candidate, number = root, 1
    while _is_used(candidate):
        number += 1
        if root.name in {"", ".."}:
            raise UserError(
                f"trainer.default_root_dir '{root}' is no folder for a run: there are files in it; name one, such as "
                f"{root / 'runs' / 'first'}"
            )
        candidate = root.with_name(f"{root.name}-{number}")
    return candidate


def refuse_foreign(root: Path) -> None:
    """Nothing if a run may write into a folder: it holds the record of a run, or nothing of the names of its files.

    Raises:
        UserError: one line with what lies there.
    """
    found = [name for name in _OURS if (root / name).exists()] if root.is_dir() else []
    if found and not is_run(root):
        raise UserError(
            f"'{root}' holds {', '.join(found)}, which no run wrote (there is no config.yaml of moa fit); a run would "
            "write over it. Give the run a folder of its own with --trainer.default_root_dir"
        )


def refuse_unwritable(root: Path) -> None:
    """Nothing if a folder can be made, or written to, as far as the system says beforehand.

    Raises:
        UserError: one line.
    """
    there = next(folder for folder in (root.absolute(), *root.absolute().parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        why = "there is no permission, or the disk is read-only" if there.is_dir() else f"{there} is a file"
        raise UserError(f"trainer.default_root_dir '{root}' cannot be written: {why}; give another folder")


def _is_used(folder: Path) -> bool:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"trainer.default_root_dir '{folder}' is a file; name a folder")
    try:
        return folder.exists() and any(folder.iterdir())
    except OSError as error:
        raise UserError(f"trainer.default_root_dir '{folder}' cannot be read: {error.strerror}") from error
