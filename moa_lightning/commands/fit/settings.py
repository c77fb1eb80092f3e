"""Settings that are accepted by their type and would fail late, or be ignored: refused before anything is loaded."""

import inspect
import math
import types
from collections.abc import Iterable, Mapping
from dataclasses import is_dataclass
from typing import Any, Union, get_args, get_origin, get_type_hints

from jsonargparse import Namespace

from moa_lightning.errors import UserError
from moa_lightning.rewards.base import check_transform
from moa_lightning.schedules import check_weights
from moa_lightning.utils.import_path import import_dotted

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
    if config.get("trainer.default_root_dir", "") is None:
        raise UserError("trainer.default_root_dir must be a folder; give one, or leave it out for its default runs/run")
    found = dict(_numbers(config))
    for name, value in found.items():
        if isinstance(value, float) and math.isnan(value):
            raise UserError(f"{_shown(name)} is NaN; give a number")
        if isinstance(value, int) and abs(value) > _LARGEST:
            raise UserError(f"{_shown(name)} is too large: {str(value)[:20]}... has {len(str(abs(value)))} digits")
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
    _check_objectives(config)


def count_in_epochs(config: Namespace) -> None:
    """Let ``trainer.val_check_interval`` be a share of an epoch, as in Lightning.

    Lightning takes a share only where it counts batches from the start of each epoch, which is its own default. Ours
    is to count them over the whole run (``trainer.check_val_every_n_epoch: null``), as rollouts have no natural epoch.

    Args:
        config: of one command; changed in place.
    """
    if isinstance(config.get("trainer.val_check_interval"), float):
        every = config.get("trainer.check_val_every_n_epoch")
        config["trainer.check_val_every_n_epoch"] = 1 if every is None else every


def check_nulls(value: Any, hint: Any, name: str) -> None:
    """Refuse a null that a setting does not take: the argument parser lets it pass in the fields of a class.

    Args:
        value: the settings below ``name``, as parsed.
        hint: their type; of a value that names its class, anything.
        name: dotted.

    Raises:
        UserError: one line with the setting and its default.
    """
    kinds = _members(hint)
    if isinstance(value, Namespace) and "class_path" in value:
        inside: Mapping[str, Any] = vars(value["init_args"]) if value.get("init_args") else {}
        kind = _class_of(value.class_path)
    elif isinstance(value, Namespace):
        inside = vars(value)
        kind = next((kind for kind in kinds if inspect.isclass(kind) and (is_dataclass(kind) or hint is kind)), None)
    else:
        parts = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
        below = next((get_args(kind)[-1] for kind in kinds if get_args(kind)), Any)
        for key, part in parts:
            check_nulls(part, below, f"{name}.{key}")
        return
    fields = arguments_of(kind)
    for field, part in inside.items():
        wanted, default = fields.get(field, (Any, None))
        if part is None and default is not None and not {Any, types.NoneType} & {*_members(wanted)}:
            own = f" {default}" if isinstance(default, bool | int | float | str) else ""
            use = "" if default is inspect.Parameter.empty else f", or leave it out for its default{own}"
            raise UserError(f"{_shown(name)}.{field} must not be null; give a value{use}")
        check_nulls(part, wanted, f"{name}.{field}")


def _class_of(path: str) -> Any:
    try:
        return import_dotted(path)
    except UserError:  # the parser found it in another way, and builds it
        return None


def _members(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def arguments_of(kind: Any) -> dict[str, tuple[Any, Any]]:
    """Type and default of the arguments of a class, or of a function; empty where nobody can say."""
    function = kind.__init__ if inspect.isclass(kind) else kind
    try:
        parameters = inspect.signature(kind).parameters.values()
    except (TypeError, ValueError):  # it has none, such as a class of C
        return {}
    return {p.name: (hint, p.default) for p in parameters if (hint := _hint(function, p.name)) is not None}


def _hint(function: Any, name: str) -> Any:
    """Type of one argument; ``None`` where it has none, or one that is imported for type checkers alone."""
    annotations, names = getattr(function, "__annotations__", {}), getattr(function, "__globals__", {})
    one = types.SimpleNamespace(__annotations__={name: annotations.get(name)}, __globals__=names)
    try:
        return get_type_hints(one)[name] if name in annotations else None
    except (NameError, TypeError, AttributeError):
        return None


def _check_objectives(config: Namespace) -> None:
    """Refuse the numbers of an objective by its name, which the objective itself does not know."""
    for name, objective in (config.get("model.objectives") or {}).items():
        of = f"model.objectives.{name}."
        if isinstance(objective.get("weight"), int | float):
            check_weights({f"{of}weight": objective.weight})
        check_transform(objective.get("scale", 1.0), objective.get("shift", 0.0), objective.get("clip"), of)


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
