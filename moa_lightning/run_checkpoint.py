"""The checkpoints of a run's folder, wherever that lies by now."""

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from moa_lightning.checkpoints import by_steps, steps_of
from moa_lightning.distributed import all_objects


def checkpoint_folder(root: str | Path, dirpath: str | Path | None) -> Path:
    """Where a run in ``root`` keeps its checkpoints; ``dirpath`` is its ``checkpoint.dirpath``."""
    return Path(dirpath).expanduser() if dirpath else Path(root) / "checkpoints"


class RunCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint, whose ``last.ckpt`` is the last one after a resume too.

    Lightning compares the folder with the one that a checkpoint names, letter by letter. After a move, or under another
    spelling, it forgot the best ones and wrote ``last-v1.ckpt`` beside a ``last.ckpt`` that went stale. Here a resumed
    run knows its files by their names in the folder, and replaces what it writes again.
    """

    @property
    def state_key(self) -> str:
        """Lightning's own, under which earlier checkpoints have it."""
        return super().state_key.replace(type(self).__qualname__, ModelCheckpoint.__qualname__, 1)

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
        """Write ``last.ckpt`` where a kill fell between the two files of the last step, and no step was left to do."""
        super().on_fit_end(trainer, pl_module)
        if not self.save_last or trainer.ckpt_path is None or self.dirpath is None or "://" in str(self.dirpath):
            return
        last = Path(self.dirpath) / f"{self.CHECKPOINT_NAME_LAST}{self.FILE_EXTENSION}"
        newest = next(iter(by_steps(last.parent)), last)
        stale = steps_of(newest) == trainer.global_step and newest != last
        stale = stale and not (last.exists() and steps_of(last) == trainer.global_step)
        if all_objects(stale)[0]:  # what the main process found
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
