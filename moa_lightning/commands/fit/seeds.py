"""Which seeds a run of the command line has."""

import os
import secrets
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import seed_everything
from lightning.pytorch.utilities import rank_zero_only

from moa_lightning.errors import UserError
from moa_lightning.training.agreement import flat

_SEEDS = 2**32  # numpy takes none above
_FOLLOWERS = ("data.init_args", "model")


def seed_run(config: Any, record: Path | None) -> None:
    """Seed the process, and write every seed in force into the config.

    ``data.seed`` and ``model.seed`` are the run's where they are not given; a resumed run keeps those that it was
    started with, since its checkpoint holds a place in an order that they decide. ``seed_everything: true`` draws a
    seed; ``false`` leaves the process's own random streams unseeded, and the seeds that follow it at 0.

    Args:
        config: of one command; changed in place.
        record: ``config.yaml`` of the run that is resumed.

    Raises:
        UserError: the seed is out of range, or each of several processes would draw one of its own.
    """
    recorded = _recorded(record)
    seed = config.seed_everything
    if seed is True:
        seed = recorded.get("seed_everything")
        seed = _drawn() if seed is None else seed
    if seed is False:
        os.environ.pop("PL_GLOBAL_SEED", None)
    elif 0 <= seed < _SEEDS:
        seed_everything(seed, workers=True)
    else:
        raise UserError(f"seed_everything must be from 0 to {_SEEDS - 1}, true or false, got {seed}")
    config.seed_everything = seed
    kept = []
    for name in _FOLLOWERS:
        part = config.get(name)
        if part is None or "seed" not in part or part.seed is not None:  # a data class may have none
            continue
        part.seed = recorded.get(f"{name}.seed", int(seed))
        if part.seed != int(seed):
            kept.append(f"{name}.seed stays {part.seed}")
    if kept:
        rank_zero_only(print)(f"resumed: {' and '.join(kept)} as in {record} (seed_everything is {seed})")


def _recorded(record: Path | None) -> dict[str, int]:
    """The seeds that a run's ``config.yaml`` names, by dotted key."""
    if record is None or not record.is_file():
        return {}
    try:
        settings = yaml.safe_load(record.read_text(encoding="utf-8"))
    except yaml.YAMLError:  # cut off as the run was killed: then what the command says counts
        return {}
    keys = flat(settings) if isinstance(settings, dict) else {}
    names = ("seed_everything", *(f"{name}.seed" for name in _FOLLOWERS))
    return {name: int(keys[name]) for name in names if keys.get(name, "").isdecimal()}


def _drawn() -> int:
    """Another seed in each run, the same on all processes that Lightning starts: they inherit the variable."""
    if "PL_GLOBAL_SEED" in os.environ:
        return int(os.environ["PL_GLOBAL_SEED"])
    if max(int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "SLURM_NTASKS")) > 1:
        raise UserError(
            "seed_everything: true would draw another seed in each of the launcher's processes; give a number"
        )
    return secrets.randbelow(_SEEDS)
