"""``config.yaml`` in the run folder, and what is said to a user who stops a run."""

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback

from moa_lightning.callbacks.writing import reason
from moa_lightning.distributed import raise_on_all_ranks
from moa_lightning.errors import UserError
from moa_lightning.training.checkpoints import by_steps, steps_of
from moa_lightning.training.run_lock import RunLock
from moa_lightning.utils.masking import masked

_GROWING = ("metrics.csv", "samples.jsonl")  # files that a run adds to


class RunConfig(SaveConfigCallback):
    """Writes ``config.yaml`` into the run folder: the record of the run.

    It waits until data, columns and models are known to fit, so that a run which cannot start leaves no folder. Tokens
    and passwords are masked in it, whatever the permissions of the folder are.
    """

    def __init__(self, parser: LightningArgumentParser, config: Namespace, **options: Any) -> None:
        super().__init__(parser, masked(config), **options)
        self.lock: RunLock | None = None
        self._fits = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Nothing yet."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the folder and write. ``ckpt_path`` is left out: the file repeats the run from its start.

        Raises:
            UserError: on every process, one line: another process runs there, or the folder cannot be written.
        """
        self._fits = True
        with raise_on_all_ranks():
            if trainer.is_global_zero:
                self._take(Path(trainer.default_root_dir))
                if self.config.ckpt_path is None:
                    self._start_afresh(Path(trainer.default_root_dir))
        self.config = self.config.clone()
        self.config.ckpt_path = None
        self._save(trainer, pl_module, "fit")

    def _save(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write it beside its place and move it there: a run killed meanwhile leaves the record whole, or none."""
        root, name = Path(trainer.default_root_dir), self.config_filename
        self.config_filename = f".{name}.partial"
        try:
            super().setup(trainer, pl_module, stage)
            if trainer.is_global_zero and (root / self.config_filename).exists():
                os.replace(root / self.config_filename, root / name)
        except OSError as error:
            raise _unwritable(root, error) from error
        finally:
            self.config_filename = name

    def _take(self, root: Path) -> None:
        try:
            root.mkdir(parents=True, exist_ok=True)
            self.lock = RunLock(root)
            self.lock.acquire()
        except OSError as error:
            with suppress(OSError):
                root.rmdir()  # it is empty
            raise _unwritable(root, error) from error

    def _start_afresh(self, root: Path) -> None:
        if any((root / "checkpoints").glob("*.ckpt")):
            raise UserError(f"another process started a run in '{root}' meanwhile; start again")
        try:
            for name in _GROWING:  # of an attempt that left no checkpoint
                (root / name).unlink(missing_ok=True)
        except OSError as error:
            raise _unwritable(root, error) from error

    def release(self) -> None:
        """Leave the folder to others."""
        if self.lock is not None:
            self.lock.release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Say how to resume a run after Ctrl-C."""
        self.release()
        if not isinstance(exception, KeyboardInterrupt) or not trainer.is_global_zero or not self._fits:
            return
        root = Path(trainer.default_root_dir)
        callback: Any = trainer.checkpoint_callback
        newest = by_steps(Path(callback.dirpath) if callback is not None else root / "checkpoints")
        goes_on = (
            f"the last checkpoint is of step {steps_of(newest[0])}; "
            f"resume with: moa fit --config {root / 'config.yaml'} --ckpt_path={newest[0]}"
            if newest
            else "no checkpoint had been written yet; they are at each evaluation (trainer.val_check_interval)"
        )
        print(f"\nstopped at step {trainer.global_step}; {goes_on}", file=sys.stderr)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the evaluation's folder and write, for ``moa validate``."""
        self._evaluate(trainer, pl_module, "validate")

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the evaluation's folder and write, for ``moa test``."""
        self._evaluate(trainer, pl_module, "test")

    def _evaluate(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take a folder that nobody has written to since it was chosen, and write. The run's own lock is left alone.

        Raises:
            UserError: on every process, one line: another evaluation chose the same folder.
        """
        if self.already_saved:  # an evaluation of moa fit
            return
        root = Path(trainer.default_root_dir)
        with raise_on_all_ranks():
            if trainer.is_global_zero:
                self._take(root)
                if (root / self.config_filename).exists():
                    self.release()
                    raise UserError(f"another process evaluated into '{root}' meanwhile; start again")
        self._save(trainer, pl_module, stage)


def _unwritable(root: Path, error: OSError) -> UserError:
    return UserError(f"the run folder '{root}' cannot be written: {reason(error)}; give another one, or make room")
