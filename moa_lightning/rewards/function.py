"""Rewards that a user writes as a Python function."""

import difflib
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from pkgutil import iter_modules
from types import ModuleType
from typing import Any

import torch

from moa_lightning.rewards.base import Reward

_DOTTED_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")
# What TRL's trainers pass beside the data's columns, and this package does not have.
_ONLY_TRL_PASSES = frozenset(
    {"prompt_ids", "completion_ids", "completions_ids", "trainer_state", "log_extra", "log_metric", "environments"}
)


@dataclass
class FunctionReward(Reward):
    """A function ``f(prompts, completions, **columns) -> list[float | None]``: the signature of TRL.

    The function is called by keyword with one list entry per completion, and gets every column of the data that it
    names, or all of them if it takes ``**kwargs``. ``None`` leaves a completion out of this objective. A module
    beside which the command is run (the current folder) can be imported.

    Differences from TRL: nothing of the trainer is passed (``completion_ids``, ``trainer_state``, …), and functions
    must not be ``async``.

    Args:
        function: dotted path, such as ``rewards.brevity`` for ``def brevity`` in ``rewards.py``; in Python, the
            function itself.
        conversational: pass each prompt and completion as a list of one chat message, as TRL does for conversational
            data; else as text. The prompt's message holds the whole prompt as the policy reads it.
    """

    function: str | Callable[..., Any]
    conversational: bool = False
    _resolved: Callable[..., Any] | None = field(default=None, init=False, repr=False, compare=False)
    _accepted: frozenset[str] | None = field(default=None, init=False, repr=False, compare=False)  # None: everything

    @property
    def title(self) -> str:
        """``function 'rewards.f'``."""
        given = self.function
        return f"function '{given if isinstance(given, str) else getattr(given, '__name__', type(given).__name__)}'"

    def check(self, columns: set[str]) -> None:
        """Import the function and compare its parameters with the columns.

        Raises:
            ValueError: it does not import, is not callable, is async, or needs a column that the data lacks.
        """
        parameters = self._resolve()
        for parameter in parameters:
            required = parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD
            if required and parameter.name not in columns | {"prompts", "completions"}:
                hint = ""
                if parameter.name in _ONLY_TRL_PASSES:
                    hint = "; only TRL's trainer passes that: give the parameter a default"
                raise ValueError(
                    f"{self.title} needs column '{parameter.name}', which the data does not have; columns: "
                    f"{', '.join(sorted(columns)) or 'none beside the prompt'}{hint}"
                )

    def setup(self, device: torch.device) -> None:
        """Import the function, for those who did not check."""
        self._resolve()

    def score(self, prompts: list[str], completions: list[str], **columns: list[Any]) -> list[float | None]:
        """What the function returns, as it is: the panel checks it."""
        if self._resolved is None:
            self._resolve()
        assert self._resolved is not None
        arguments: dict[str, list[Any]] = {
            "prompts": self._as_messages("user", prompts),
            "completions": self._as_messages("assistant", completions),
            **columns,
        }
        if self._accepted is not None:
            arguments = {name: values for name, values in arguments.items() if name in self._accepted}
        scores: list[float | None] = self._resolved(**arguments)
        return scores

    def _as_messages(self, role: str, texts: list[Any]) -> list[Any]:
        return [[{"role": role, "content": text}] for text in texts] if self.conversational else texts

    def _resolve(self) -> list[inspect.Parameter]:
        """Find the function once; its parameters, without ``*args``."""
        if self._resolved is None:
            found = _import(self.function) if isinstance(self.function, str) else self.function
            self._resolved = self._callable(found)
        try:
            signature = inspect.signature(self._resolved)
        except (TypeError, ValueError):
            raise ValueError(
                f"{self.title} has no signature that Python can read; wrap it: def f(prompts, completions, **kwargs)"
            ) from None
        parameters = [p for p in signature.parameters.values() if p.kind is not p.VAR_POSITIONAL]
        positional = [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY]
        if positional:
            raise ValueError(
                f"{self.title} takes '{positional[0]}' by position only, but rewards are called by "
                "keyword; remove the '/'"
            )
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            self._accepted = frozenset(p.name for p in parameters)
        return parameters

    def _callable(self, found: Any) -> Callable[..., Any]:
        if inspect.isclass(found) or not callable(found):
            kind = "a class" if inspect.isclass(found) else f"of type {type(found).__name__}"
            raise ValueError(
                f"{self.title} is {kind}, not a function; give the path of a function f(prompts, completions, **kwargs)"
            )
        inside = getattr(found, "__call__", found)  # noqa: B004  # an object's own __call__ may be the async one
        if any(test(f) for f in (found, inside) for test in (inspect.iscoroutinefunction, inspect.isasyncgenfunction)):
            raise ValueError(f"{self.title} is async, which is not supported; write 'def' instead of 'async def'")
        return found  # type: ignore[no-any-return]  # checked above; narrowing loses it


def _import(path: str) -> Any:
    """The object at a dotted path."""
    if not _DOTTED_PATH.fullmatch(path):
        raise ValueError(f"function '{path}' is not a dotted path; write 'rewards.f' for 'def f' in rewards.py")
    with _current_folder_first():
        module, rest = _import_module(path)
    found: Any = module
    for name in rest:
        if not hasattr(found, name):
            near = _nearest(name, [n for n in dir(found) if callable(getattr(found, n, None)) and n[0] != "_"])
            raise ValueError(f"function '{path}': '{_name_of(found)}' has no '{name}'{near}")
        found = getattr(found, name)
    return found


def _import_module(path: str) -> tuple[ModuleType, list[str]]:
    """The longest module that the path starts with, and the names that are left."""
    parts = path.split(".")
    module, depth = _import_one(path, parts[0]), 1
    while depth < len(parts) - 1 and not hasattr(module, parts[depth]):
        module = _import_one(path, ".".join(parts[: depth + 1]))
        depth += 1
    return module, parts[depth:]


def _import_one(path: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:  # the module is there; something that it imports is not
            raise ValueError(f"function '{path}': importing '{name}' failed: {error}") from error
        parent, _, last = name.rpartition(".")
        places = list(getattr(sys.modules[parent], "__path__", [])) if parent else None
        if parent and not places:
            raise ValueError(f"function '{path}': '{parent}' is a module and has no '{last}' in it") from error
        near = _nearest(last, [module.name for module in iter_modules(places)])
        where = f"in package '{parent}'" if parent else f"installed or in the current folder ({Path.cwd()})"
        raise ValueError(f"function '{path}': there is no module '{last}' {where}{near}") from error
    except Exception as error:
        # A user's module may raise anything while it is imported.
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"function '{path}': importing '{name}' failed: {reason}") from error


@contextmanager
def _current_folder_first() -> Iterator[None]:
    """Import from the current folder first, as ``python -m`` does; afterwards it comes last.

    It stays importable, for imports inside the user's functions, but no longer hides installed packages.
    """
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(folder)
        if folder not in sys.path:
            sys.path.append(folder)


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean '{close[0]}'?" if close else ""


def _name_of(found: Any) -> str:
    return str(getattr(found, "__qualname__", None) or getattr(found, "__name__", type(found).__name__))
