"""The run's seed, and the random state of a process as plain containers for checkpoints."""

import os
import random
from typing import Any

import numpy as np
import torch


def run_seed(own: int | None = None) -> int:
    """The seed to use: a component's own, or that of the last ``seed_everything``, or 0."""
    return int(os.environ.get("PL_GLOBAL_SEED", "0")) if own is None else own


def random_state() -> dict[str, Any]:
    """State of the generators of Python, numpy and torch, including the process's GPUs."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002  # the generator that libraries use
    return {
        "python": random.getstate(),
        "numpy": (kind, np.asarray(keys).tolist(), int(position), int(has_gauss), float(gauss)),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Restore the state of all generators. GPU generators stay as they are if the number of GPUs differs."""
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    kind, numbers, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.array(numbers, dtype=np.uint32), position, has_gauss, cached))  # noqa: NPY002
    torch.set_rng_state(state["torch"].cpu())
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([stream.cpu() for stream in state["cuda"]])
