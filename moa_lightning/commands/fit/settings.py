"""Settings that are accepted by their type and would fail late, or be ignored: refused before anything is loaded."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from jsonargparse import Namespace

from moa_lightning.errors import UserError

_LARGEST = 2**63 - 1
_LEAST = {  # of settings that are numbers, and only of those: 0.5 may be a share where 2 is a count
    "trainer.accumulate_grad_batches": 1,
    "trainer.gradient_clip_val": 0,
    "trainer.limit_train_batches": 0,
    "trainer.limit_val_batches": 0,
    "trainer.limit_test_batches": 0,
    "trainer.limit_predict_batches": 0,
    "trainer.log_every_n_steps": 0,
    "trainer.num_nodes": 1,
    "trainer.num_sanity_val_steps": -1,
    "checkpoint.save_top_k": -1,
    "checkpoint.every_n_train_steps": 0,
    "checkpoint.every_n_epochs": 0,
    "model.optimizer.init_args.lr": 0,
    "model.optimizer.init_args.weight_decay": 0,
    "model.optimizer.init_args.eps": 0,
}
_FINITE = ("trainer.gradient_clip_val", "model.optimizer.init_args.lr", "model.optimizer.init_args.weight_decay")


def check_settings(config: Namespace) -> None:
    """Refuse numbers that no setting takes, and those that are out of a setting's range.

    Args:
        config: of one command.

    Raises:
        UserError: one line with the setting and its value.
    """
    found = dict(_numbers(config))
    for name, value in found.items():
        if isinstance(value, float) and math.isnan(value):
            raise UserError(f"{name} is NaN; give a number")
        if isinstance(value, int) and abs(value) > _LARGEST:
            raise UserError(f"{name} is too large: {str(value)[:20]}... has {len(str(abs(value)))} digits")
    for name, least in _LEAST.items():
        if found.get(name, least) < least:
            raise UserError(f"{_shown(name)} must be at least {least}, got {found[name]}")
    for name in _FINITE:
        if math.isinf(found.get(name, 0)):
            raise UserError(f"{_shown(name)} must be finite, got {found[name]}")
    interval = found.get("trainer.val_check_interval", 1)
    if not (isinstance(interval, int) and interval >= 1) and not 0 < interval <= 1:
        raise UserError(
            "trainer.val_check_interval must be a number of batches, at least 1, or a share of an epoch, above 0 and "
            f"at most 1.0; got {interval}"
        )


def _numbers(value: Any, name: str = "") -> Iterable[tuple[str, Any]]:
    parts: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, Namespace):
        parts = vars(value).items()
    elif isinstance(value, Mapping):
        parts = value.items()
    elif isinstance(value, list | tuple):
        parts = enumerate(value)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield name, value
    for key, part in parts:
        yield from _numbers(part, f"{name}.{key}" if name else str(key))


def _shown(name: str) -> str:
    """As it is written on the command line."""
    return name.replace(".init_args", "")
