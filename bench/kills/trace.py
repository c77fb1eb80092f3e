"""``moa``, writing down what it does when: ``TRACE=FILE python -m bench.kills.trace fit ...``.

Each line of the file is a time (``time.monotonic``, which all processes of a machine share) and a phase of
``PHASES``, from that moment on. Only the main process writes. The run itself is the same to the bit.
"""

import os
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

PHASES = ("rollout", "before update", "update", "evaluation", "saving")
STARTING, OTHER = "starting", "between"


def write(phase: str) -> None:
    """Append a line; what is written is there also after a ``SIGKILL``."""
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        with Path(os.environ["TRACE"]).open("a") as file:
            file.write(f"{time.monotonic()} {phase}\n")


def read(file: Path) -> list[tuple[float, str]]:
    """Times and phases; a last line that is not whole yet is left out."""
    whole = file.read_text().rpartition("\n")[0].splitlines() if file.exists() else []
    return [(float(line.split(" ", 1)[0]), line.split(" ", 1)[1]) for line in whole]


def during(owner: type, name: str, phase: str, then: str) -> None:
    """Have a method write its phase when it begins, and another one when it has ended."""
    method: Callable[..., Any] = getattr(owner, name)

    @wraps(method)
    def traced(*args: Any, **kwargs: Any) -> Any:
        write(phase)
        result = method(*args, **kwargs)
        write(then)
        return result

    setattr(owner, name, traced)


def main() -> None:
    """Trace and run."""
    write(STARTING)
    from lightning.pytorch import Trainer
    from lightning.pytorch.loops.evaluation_loop import _EvaluationLoop
    from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop

    from moa_lightning.cli import main as moa
    from moa_lightning.module import AlignmentModule

    during(AlignmentModule, "collect", "rollout", "before update")
    during(AlignmentModule, "training_step", "update", "update")  # backward pass and optimiser follow
    during(AlignmentModule, "optimizer_step", "update", OTHER)
    during(_EvaluationLoop, "run", "evaluation", OTHER)
    during(_TrainingEpochLoop, "advance", OTHER, OTHER)
    during(Trainer, "save_checkpoint", "saving", OTHER)
    moa()


if __name__ == "__main__":
    main()
