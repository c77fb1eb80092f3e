"""A short run that kills itself at a moment that has a name, for tests that go on with it."""

import io
import os
import signal
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from moa_lightning.callbacks import EvaluationCallback
from moa_lightning.combiners import DynamicWeights
from moa_lightning.module import AlignmentModule
from moa_lightning.sources import Rollout
from moa_lightning.training.checkpoints import AtomicCheckpointIO, newest_valid
from tests.helpers import processes


def die(*_: Any, **__: Any) -> None:
    """What the machine does to a process that takes too much memory."""
    os.kill(os.getpid(), signal.SIGKILL)


def half_written(content: Any, file: Any) -> None:
    """The first half of a checkpoint, and death."""
    whole = io.BytesIO()
    SAVE(content, whole)
    data = whole.getvalue()[: whole.tell() // 2]
    if hasattr(file, "write"):
        file.write(data)
        file.flush()
    else:
        Path(file).write_bytes(data)
    die()


def collected_and_dead(*arguments: Any, **more: Any) -> None:
    """A whole rollout that no update comes of."""
    COLLECT(*arguments, **more)
    die()


SAVE, COLLECT = torch.save, AlignmentModule.collect
MOMENTS: dict[str, tuple[Any, str, Any]] = {
    "in a rollout": (Rollout, "_token_rewards", die),
    "between rollout and update": (AlignmentModule, "collect", collected_and_dead),
    "in an update": (AlignmentModule, "optimizer_step", die),
    "in an evaluation": (AlignmentModule, "validation_step", die),
    "in the writing of a checkpoint": (torch, "save", half_written),
}


def at(moment: str, number: int) -> Any:
    """A patch that has the nth call die."""
    owner, name, death = MOMENTS[moment]
    method, calls = getattr(owner, name), [0]

    def counted(*arguments: Any, **more: Any) -> Any:
        calls[0] += 1
        return (death if calls[0] == number else method)(*arguments, **more)

    return patch.object(owner, name, counted)


class Evaluated(EvaluationCallback):
    """The step and a mean of each evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.points: list[list[float]] = []

    def on_evaluation(self, trainer, pl_module, statistics, batches) -> None:
        self.points.append([float(trainer.global_step), statistics["short"].mean])

    def state_dict(self) -> dict[str, Any]:
        return {"points": self.points}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.points = state_dict["points"]


def combiner() -> DynamicWeights:
    """One that hears of evaluations."""
    return DynamicWeights(lr=0.5, interval=1, growth_scale=0.1, reference={"good": -9.0, "short": -9.0})


def run(folder: Path, root: Path, moment: str | None = None, number: int = 0) -> None:
    """Start in ``root``, or go on from its newest checkpoint; at the end its weights lie in ``end.pt``."""
    torch.set_num_threads(1)
    seed_everything(0, verbose=False)
    saved = newest_valid(root / "checkpoints")
    (root / "went-on-from").parent.mkdir(parents=True, exist_ok=True)
    (root / "went-on-from").write_text(str(saved))
    moa, evaluated = (
        processes.module({"combiner": combiner, "passes": 2, "lora": True, "dropout": 0.1}, folder),
        Evaluated(),
    )
    trainer = Trainer(
        default_root_dir=root,
        accelerator="cpu",
        max_steps=4,
        plugins=[AtomicCheckpointIO()],
        val_check_interval=1,
        num_sanity_val_steps=-1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ModelCheckpoint(root / "checkpoints", every_n_train_steps=1, save_last=True), evaluated],
    )
    with ExitStack() as stack:
        if moment is not None:
            stack.enter_context(at(moment, number))
        trainer.fit(moa, datamodule=processes.Films(batch_size=4, val_batch_size=12), ckpt_path=saved)
    end = {"weights": moa.state_dict(), "state": moa.combiner_state, "evaluated": evaluated.points}
    SAVE(end, root / "end.pt")
