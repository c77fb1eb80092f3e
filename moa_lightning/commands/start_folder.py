"""Which folder a run works in, and where its checkpoints are."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from moa_lightning.checkpoints import newest_whole
from moa_lightning.run_checkpoint import checkpoint_folder

_RECORD = "config.yaml"
_HEADER = "# lightning.pytorch=="  # the first line of what Lightning's CLI saves
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
        return newest_whole(self.checkpoints)


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
    return next((folder for folder in checkpoint.parents[:2] if is_run(folder)), None)
