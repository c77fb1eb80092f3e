"""Preemption on a cluster: a signal saves the run and stops it, and a process that fails stops the others."""

import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from typing_extensions import override

from moa_lightning.distributed import all_min, all_objects, any_rank, rank
from moa_lightning.utils.lightning_private import end_batch, log_training_step, validation_is_due
from moa_lightning.utils.random_state import random_state, restore_random_state

REQUEUE = 75
"""Exit code of a run that a signal stopped and that can be resumed: ``EX_TEMPFAIL`` of ``sysexits.h``."""
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_PATIENCE = 5.0  # seconds that processes have to exit with their own message before they are killed


class Stopped(SystemExit):
    """The run stopped because of a signal."""


class Preemption(Callback):
    """Saves ``last.ckpt`` and ends the run with exit code 75, on ``SIGTERM`` or ``SIGUSR1``.

    The current update is finished first. An evaluation is aborted, and the resumed run reruns it. A signal to one
    process is enough: all processes stop at the same step. This replaces Lightning's own handlers, which save wherever
    the signal arrives.

    If the main process fails, the processes that Lightning started are stopped too, after a short time to print their
    own errors.
    """

    def __init__(self) -> None:
        self._asked = False
        self._step = 0  # before the current batch
        self._lockstep = 0  # evaluation batches that every process has
        self._before: dict[str, Any] | None = None  # random state at the start of the current evaluation
        self._resumed: dict[str, Any] | None = None  # random state to rerun an aborted evaluation with
        self._unfinished = False  # whether the evaluation of the checkpoint that is being written was aborted

    @override
    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._install_handlers()

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._install_handlers()

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop after an update, if any process got a signal."""
        if trainer.global_step == self._step:  # checkpoints do not hold accumulated gradients
            return
        self._asked = any_rank(self._asked, pl_module.device)
        # If an evaluation is due, stop at its start instead: the checkpoint then holds the random state for its rerun.
        if self._asked and not validation_is_due(trainer):
            end_batch(trainer)
            log_training_step(trainer)  # Lightning would log this step after this hook
            self._save_and_stop(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop before an evaluation, or restore the random state to rerun an aborted one."""
        self._install_handlers()
        self._lockstep = all_min(int(min(sum(trainer.num_val_batches), 2**31)), pl_module.device)
        if self._resumed is not None:
            restore_random_state(self._resumed)
        self._before = random_state()
        self._stop_evaluating(trainer, pl_module)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Stop during an evaluation, at batches that all processes have."""
        if 0 < batch_idx < self._lockstep:
            self._stop_evaluating(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After a rerun evaluation, let training continue with the random state that the aborted run would have had."""
        if self._resumed is not None and trainer.state.fn == TrainerFn.FITTING:
            loader: Any = trainer.train_dataloader
            loader.random = random_state()
        self._resumed = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop the processes that Lightning started: they would wait for this one forever."""
        processes: list[subprocess.Popen[bytes]] = getattr(trainer.strategy.launcher, "procs", [])
        started = list(processes)
        processes.clear()  # Lightning's observer would kill this process as soon as one of them exits
        if isinstance(exception, KeyboardInterrupt):  # Lightning stops them
            processes += started
            return
        for number, process in enumerate(started, start=1):
            try:
                code = process.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
            else:
                if code and not isinstance(exception, Stopped):
                    how = f"was killed by signal {-code}" if code < 0 else f"failed with exit code {code}"
                    print(f"moa: process {number} {how}", file=sys.stderr)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Record in the checkpoint that the evaluation at its step was aborted, if it was."""
        if self._unfinished:
            # Lightning reruns all of an evaluation if its progress is that of the first batch.
            progress = checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]
            for part, before in (("total", progress["total"]["completed"]), ("current", 0)):
                progress[part] |= {"ready": before + 1, "started": before + 1, "processed": before, "completed": before}

    def state_dict(self) -> dict[str, Any]:
        """Every process's random state at the start of an aborted evaluation."""
        return {"streams": all_objects(self._before)} if self._unfinished else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the random state for the rerun of an aborted evaluation."""
        streams = state_dict["streams"]
        self._resumed = streams[rank()] if rank() < len(streams) else None

    def _install_handlers(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                signal.signal(number, self._on_signal)  # Lightning restores the previous handlers at the end

    def _on_signal(self, number: int, frame: Any) -> None:
        self._asked = True

    def _stop_evaluating(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not any_rank(self._asked, pl_module.device):
            return
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:  # there is no progress to save
            self._stop(trainer, "")
        self._unfinished = True
        assert self._before is not None
        restore_random_state(self._before)
        self._save_and_stop(trainer)

    def _save_and_stop(self, trainer: Trainer) -> None:
        first: Any = trainer.checkpoint_callback
        folder = first.dirpath if first is not None else Path(trainer.default_root_dir) / "checkpoints"
        path = Path(folder) / f"{ModelCheckpoint.CHECKPOINT_NAME_LAST}{ModelCheckpoint.FILE_EXTENSION}"
        if first is not None:
            first.last_model_path = str(path)  # else it would write last-v1.ckpt instead of replacing last.ckpt
        trainer.save_checkpoint(path, weights_only=False)
        self._stop(trainer, f"saved {path}; resume with --ckpt_path=last")

    def _stop(self, trainer: Trainer, what: str) -> None:
        if trainer.is_global_zero:
            print(f"moa: stopped at step {trainer.global_step} as asked; {what or 'nothing to save'}", file=sys.stderr)
        # Lightning kills the main process if a process that it started exits with another code than 0.
        environment = getattr(trainer.strategy, "cluster_environment", None)
        started = isinstance(environment, LightningEnvironment) and trainer.local_rank > 0
        raise Stopped(0 if started else REQUEUE)
