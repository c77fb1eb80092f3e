"""The checkpoints of a run's folder, wherever that lies by now."""

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from moa_lightning.distributed import all_objects
from moa_lightning.training.checkpoints import by_steps, steps_of


def checkpoint_folder(root: str | Path, dirpath: str | Path | None) -> Path:
    """Where a run in ``root`` keeps its checkpoints; ``dirpath`` is its ``checkpoint.dirpath``."""
    return Path(dirpath).expanduser() if dirpath else Path(root) / "checkpoints"


class RunCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint, whose ``last.ckpt`` is the last one after a resume too.

    Lightning compares the folder with the one that a checkpoint names, letter by letter. After a move, or under another
    spelling, it forgot the best ones and wrote ``last-v1.ckpt`` beside a ``last.ckpt`` that went stale. Here a resumed
    run knows its files by their names in the folder, and replaces what it writes again.

    Lightning writes a checkpoint before it removes the one that it replaces. A kill between the two left both for good.
    Here the new one names the other, and a run that resumes from it removes that.
    """

    _written: frozenset[str] = frozenset()  # by this run, and not removed since
    _superseded: frozenset[str] = frozenset()  # what the run that is resumed was about to remove

    @property
    def state_key(self) -> str:
        """Lightning's own, under which earlier checkpoints have it."""
        return super().state_key.replace(type(self).__qualname__, ModelCheckpoint.__qualname__, 1)

    def state_dict(self) -> dict[str, Any]:
        """Lightning's, and the files that will be removed once this checkpoint is on the disk."""
        keeps_all = self.save_top_k == -1
        return {**super().state_dict(), "superseded": [] if keeps_all else sorted(self._written - self._kept())}

    def _kept(self) -> frozenset[str]:
        return frozenset({self.best_model_path, self.last_model_path, *self.best_k_models} - {""})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore, with the paths of the present folder; files that are gone are forgotten."""
        assert self.dirpath is not None
        before, now = Path(state_dict.get("dirpath") or self.dirpath), Path(self.dirpath)

        def moved(path: str) -> str:
            return str(now / Path(path).relative_to(before)) if path and Path(path).is_relative_to(before) else path

        best = {moved(path): score for path, score in state_dict.get("best_k_models", {}).items()}
        one = {name: moved(state_dict.get(name, "")) for name in ("best_model_path", "last_model_path")}
        known = {*best, *one.values()}
        there: set[str] = all_objects({path for path in known if path and Path(path).exists()})[0]  # the same for all
        best = {path: score for path, score in best.items() if path in there}
        one = {name: path if path in there else "" for name, path in one.items()}
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
        """Remove what the run was about to remove when it was killed; the checkpoint that it resumes from is newer."""
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
        """Lightning keeps what a run resumed from; here a resumed run ends with the files of an unbroken one."""
        if self.dirpath is None or "://" in str(self.dirpath):
            return bool(super()._should_remove_checkpoint(trainer, previous, current))
        return previous != current and Path(self.dirpath).absolute() in Path(previous).absolute().parents

    def _save_topk_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        """Save it, if it is among the best; if not, have Lightning write ``last.ckpt`` all the same.

        Lightning writes ``last.ckpt`` only where it has just saved one of the best. With ``monitor`` it went stale, and
        with ``save_top_k=0`` it appeared at the end alone.
        """
        super()._save_topk_checkpoint(trainer, monitor_candidates)
        if self.save_last and self._last_global_step_saved != trainer.global_step:
            self._last_global_step_saved = trainer.global_step  # what Lightning asks before it writes last.ckpt
            self._last_checkpoint_saved = ""  # or save_last="link" would link to the one saved before

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what is missing where a kill fell between the files of the last step, and no step was left to do."""
        super().on_fit_end(trainer, pl_module)
        if trainer.ckpt_path is None or self.dirpath is None or "://" in str(self.dirpath):
            return
        last = Path(self.dirpath) / f"{self.CHECKPOINT_NAME_LAST}{self.FILE_EXTENSION}"
        there = {path for path in by_steps(last.parent) if steps_of(path) == trainer.global_step}
        # Another callback writes its checkpoint of an evaluation just before this one's turn.
        turn, stale = all_objects((there and not there & set(map(Path, self._kept())), there and last not in there))[0]
        if turn:
            super().on_validation_end(trainer, pl_module)
        elif stale and self.save_last:
            self.last_model_path = str(last)
            self._save_checkpoint(trainer, str(last))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save, with ``save_on_exception``; what keeps that from being written must not hide the error."""
        try:
            super().on_exception(trainer, pl_module, exception)
        except (ValueError, OSError) as error:
            rank_zero_warn(f"no checkpoint was written after the error: {error}")

    def file_exists(self, filepath: Any, trainer: Trainer) -> bool:
        """Whether a file must be left alone: in the folder that the run resumed in, only one of the best is."""
        resumed = trainer.ckpt_path is not None and self.dirpath is not None
        if resumed and Path(str(trainer.ckpt_path)).resolve().parent == Path(str(self.dirpath)).resolve():
            return str(filepath) in self.best_k_models
        return bool(super().file_exists(filepath, trainer))
