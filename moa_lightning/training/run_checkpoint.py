"""ModelCheckpoint for run folders that may be moved and resumed."""

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from moa_lightning.distributed import all_objects
from moa_lightning.training.checkpoints import by_steps, steps_of


def checkpoint_folder(root: str | Path, dirpath: str | Path | None) -> Path:
    """Checkpoint folder of a run in ``root``; ``dirpath`` is its ``checkpoint.dirpath``."""
    return Path(dirpath).expanduser() if dirpath else Path(root) / "checkpoints"


class RunCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint, with a ``last.ckpt`` that stays current after a resume.

    Lightning compares the folder's path literally with the one in the checkpoint. If the folder was moved, or its path
    is spelled differently, it forgets the best checkpoints and writes ``last-v1.ckpt`` while ``last.ckpt`` goes stale.
    This class identifies files by their names in the folder, and replaces them.

    Lightning writes a checkpoint before it removes the one that it replaces. If it is killed between the two, both stay
    forever. Here the new checkpoint records the old one, and a run that resumes from it removes the old one.
    """

    _written: frozenset[str] = frozenset()  # by this run, and not removed since
    _superseded: frozenset[str] = frozenset()  # files that the interrupted run was about to remove

    @property
    def state_key(self) -> str:
        """Lightning's own key, under which earlier checkpoints hold this state."""
        return super().state_key.replace(type(self).__qualname__, ModelCheckpoint.__qualname__, 1)

    def state_dict(self) -> dict[str, Any]:
        """Lightning's state, and the files that will be removed once this checkpoint is on disk."""
        keeps_all = self.save_top_k == -1
        return {**super().state_dict(), "superseded": [] if keeps_all else sorted(self._written - self._kept())}

    def _kept(self) -> frozenset[str]:
        return frozenset({self.best_model_path, self.last_model_path, *self.best_k_models} - {""})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state with paths in the current folder, without files that no longer exist."""
        assert self.dirpath is not None
        before, now = Path(state_dict.get("dirpath") or self.dirpath), Path(self.dirpath)

        def moved(path: str) -> str:
            return str(now / Path(path).relative_to(before)) if path and Path(path).is_relative_to(before) else path

        best = {moved(path): score for path, score in state_dict.get("best_k_models", {}).items()}
        one = {name: moved(state_dict.get(name, "")) for name in ("best_model_path", "last_model_path")}
        known = {*best, *one.values()}
        existing: set[str] = all_objects({path for path in known if path and Path(path).exists()})[0]  # rank 0's
        best = {path: score for path, score in best.items() if path in existing}
        one = {name: path if path in existing else "" for name, path in one.items()}
        worst = (max if self.mode == "min" else min)(best, key=lambda path: float(best[path]), default="")
        super().load_state_dict(
            {
                **state_dict,
                **one,
                "dirpath": self.dirpath,
                "best_k_models": best,
                "kth_best_model_path": worst,
                "kth_value": best.get(worst, self.kth_value),
            }
        )
        self._written = self._kept()
        superseded = {moved(path) for path in state_dict.get("superseded", [])} - self._kept()
        self._superseded = frozenset(path for path in superseded if Path(path).parent == now)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove files that the run was about to remove when it was killed; the resumed checkpoint is newer."""
        for path in sorted(self._superseded):
            self._remove_checkpoint(trainer, path)
        self._superseded = frozenset()

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        self._written |= {filepath}
        super()._save_checkpoint(trainer, filepath)

    def _remove_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        super()._remove_checkpoint(trainer, filepath)
        self._written -= {filepath}

    def _should_remove_checkpoint(self, trainer: Trainer, previous: str, current: str) -> bool:
        """Whether to remove a replaced checkpoint. Unlike Lightning, that includes the one that was resumed from."""
        if self.dirpath is None or "://" in str(self.dirpath):
            return bool(super()._should_remove_checkpoint(trainer, previous, current))
        return previous != current and Path(self.dirpath).absolute() in Path(previous).absolute().parents

    def _save_topk_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        """Save a checkpoint if it is among the best; otherwise let Lightning still write ``last.ckpt``.

        Lightning writes ``last.ckpt`` only after it has saved one of the best. With ``monitor`` it would go stale, and
        with ``save_top_k=0`` it would appear only at the end.
        """
        super()._save_topk_checkpoint(trainer, monitor_candidates)
        if self.save_last and self._last_global_step_saved != trainer.global_step:
            self._last_global_step_saved = trainer.global_step  # what Lightning asks before it writes last.ckpt
            self._last_checkpoint_saved = ""  # or save_last="link" would link to the one saved before

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write missing files if the run was killed between the files of the last step, so that no step was left."""
        super().on_fit_end(trainer, pl_module)
        if trainer.ckpt_path is None or self.dirpath is None or "://" in str(self.dirpath):
            return
        last = Path(self.dirpath) / f"{self.CHECKPOINT_NAME_LAST}{self.FILE_EXTENSION}"
        # Another callback writes its checkpoint of an evaluation just before this one.
        newest = self._newest(trainer)
        if all_objects(bool(newest) and not newest & set(map(Path, self._kept())))[0]:
            super().on_validation_end(trainer, pl_module)
        newest = self._newest(trainer)
        if self.save_last and all_objects(bool(newest) and last not in newest)[0]:
            self.last_model_path = str(last)
            self._save_checkpoint(trainer, str(last))

    def _newest(self, trainer: Trainer) -> set[Path]:
        """The checkpoints of the run's last step."""
        return {path for path in by_steps(Path(str(self.dirpath))) if steps_of(path) == trainer.global_step}

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save a checkpoint if ``save_on_exception`` is set. A failure to write it must not hide the error."""
        try:
            super().on_exception(trainer, pl_module, exception)
        except (ValueError, OSError) as error:
            rank_zero_warn(f"no checkpoint was written after the error: {error}")

    def file_exists(self, filepath: Any, trainer: Trainer) -> bool:
        """Whether a file must not be overwritten: in the folder that the run resumed in, only the best checkpoints."""
        resumed = trainer.ckpt_path is not None and self.dirpath is not None
        if resumed and Path(str(trainer.ckpt_path)).resolve().parent == Path(str(self.dirpath)).resolve():
            return str(filepath) in self.best_k_models
        return bool(super().file_exists(filepath, trainer))
