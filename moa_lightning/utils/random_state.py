"""What seeds a run, and the random streams of a process as plain containers that a checkpoint can hold."""

import os
import random
from typing import Any

import numpy as np
import torch


def run_seed(own: int | None = None) -> int:
    """The seed that is in force: a part's own, or else the run's, which ``seed_everything`` was given last.

    0 where neither is given.
    """
    return int(os.environ.get("PL_GLOBAL_SEED", "0")) if own is None else own


def random_state() -> dict[str, Any]:
    """State of Python's, numpy's and torch's generators, those of the process's GPUs included."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002  # the one that libraries draw from
    return {
        "python": random.getstate(),
        "numpy": (kind, np.asarray(keys).tolist(), int(position), int(has_gauss), float(gauss)),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Go on drawing from there; GPUs that the state does not know keep theirs."""
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    kind, numbers, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.array(numbers, dtype=np.uint32), position, has_gauss, cached))  # noqa: NPY002
    torch.set_rng_state(state["torch"].cpu())
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([stream.cpu() for stream in state["cuda"]])
