"""Stopping as a cluster wants it: a signal saves the run and ends it; a process that fails ends the others."""

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

from moa_lightning.distributed import all_min, all_objects, any_rank, rank
from moa_lightning.utils.lightning_private import end_batch, log_training_step, validation_is_due
from moa_lightning.utils.random_state import random_state, restore_random_state

REQUEUE = 75
"""Exit code of a run that was asked to stop and can go on: ``EX_TEMPFAIL`` of ``sysexits.h``."""
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_PATIENCE = 5.0  # seconds in which processes may end, and say why, before they are killed


class Stopped(SystemExit):
    """The run was asked to stop, and did."""


class Preemption(Callback):
    """Saves ``last.ckpt`` and ends the run with exit code 75, on ``SIGTERM`` or ``SIGUSR1``.

    The update that is under way is finished first, an evaluation is not: the resumed run makes it anew. One process
    that gets the signal is enough: all stop at the same step. Lightning's own handlers are replaced, which save
    wherever the signal finds the run.

    Processes that Lightning started end when the first one fails, after a moment to say what happened to them.
    """

    def __init__(self) -> None:
        self._asked = False
        self._step = 0  # before the present batch
        self._lockstep = 0  # evaluation batches that every process has
        self._before: dict[str, Any] | None = None  # random streams at the start of the present evaluation
        self._resumed: dict[str, Any] | None = None  # those with which an evaluation is made anew
        self._unfinished = False  # a checkpoint is being written whose evaluation is still to be made

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen from here on."""
        self._listen()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen from here on."""
        self._listen()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Note the step."""
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop after an update, if any process was asked to."""
        if trainer.global_step == self._step:  # gradients that are being collected are in no checkpoint
            return
        self._asked = any_rank(self._asked, pl_module.device)
        # Where an evaluation is due it begins first: then the checkpoint says what it is to draw when it is made anew.
        if self._asked and not validation_is_due(trainer):
            end_batch(trainer)
            log_training_step(trainer)  # the step's row, which Lightning writes after this
            self._save_and_stop(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop before an evaluation, or draw in it what was drawn in the one that was broken off."""
        self._listen()
        self._lockstep = all_min(int(min(sum(trainer.num_val_batches), 2**31)), pl_module.device)
        if self._resumed is not None:
            restore_random_state(self._resumed)
        self._before = random_state()
        self._stop_evaluating(trainer, pl_module)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Stop within an evaluation, where all processes come past."""
        if 0 < batch_idx < self._lockstep:
            self._stop_evaluating(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """An evaluation that was made anew leaves the random streams to the training as the first one would have."""
        if self._resumed is not None and trainer.state.fn == TrainerFn.FITTING:
            loader: Any = trainer.train_dataloader
            loader.random = random_state()
        self._resumed = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """End the processes that Lightning started: left alone, they would wait for this one."""
        processes: list[subprocess.Popen[bytes]] = getattr(trainer.strategy.launcher, "procs", [])
        started = list(processes)
        processes.clear()  # Lightning's observer would kill this process as soon as one of them has ended
        if isinstance(exception, KeyboardInterrupt):  # Lightning ends them
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
        """Say in the checkpoint that the evaluation at its step is still to be made, if it is."""
        if self._unfinished:
            # What Lightning finds in the first batch of an evaluation, from which it makes the whole one.
            progress = checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]
            for part, before in (("total", progress["total"]["completed"]), ("current", 0)):
                progress[part] |= {"ready": before + 1, "started": before + 1, "processed": before, "completed": before}

    def state_dict(self) -> dict[str, Any]:
        """The random streams that an unfinished evaluation began with, of every process."""
        return {"streams": all_objects(self._before)} if self._unfinished else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Begin it with them."""
        streams = state_dict["streams"]
        self._resumed = streams[rank()] if rank() < len(streams) else None

    def _listen(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                signal.signal(number, self._ask)  # Lightning puts the former ones back at the end

    def _ask(self, number: int, frame: Any) -> None:
        self._asked = True

    def _stop_evaluating(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not any_rank(self._asked, pl_module.device):
            return
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:  # before the first update, or after all
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
            first.last_model_path = str(path)  # else it would not overwrite the file, but write another beside it
        trainer.save_checkpoint(path, weights_only=False)
        self._stop(trainer, f"saved {path}, from which --ckpt_path=last goes on")

    def _stop(self, trainer: Trainer, what: str) -> None:
        if trainer.is_global_zero:
            print(f"moa: stopped at step {trainer.global_step} as asked; {what or 'nothing to save'}", file=sys.stderr)
        # Another code than 0 of a process that Lightning started makes it kill the one that started it.
        environment = getattr(trainer.strategy, "cluster_environment", None)
        started = isinstance(environment, LightningEnvironment) and trainer.local_rank > 0
        raise Stopped(0 if started else REQUEUE)
