"""Importing objects by dotted path."""

import difflib
import importlib
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pkgutil import iter_modules
from types import ModuleType
from typing import Any

from moa_lightning.errors import UserError

_DOTTED_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")


def import_dotted(path: str) -> Any:
    """Import the object at a dotted path, also from modules in the current folder.

    Raises:
        UserError: the import fails; one line with the closest existing name.
    """
    if not _DOTTED_PATH.fullmatch(path):
        raise UserError(f"function '{path}' is not a dotted path; write 'rewards.f' for 'def f' in rewards.py")
    with _current_folder_first():
        module, rest = _import_module(path)
    found: Any = module
    for name in rest:
        if not hasattr(found, name):
            near = _nearest(name, [n for n in dir(found) if callable(getattr(found, n, None)) and n[0] != "_"])
            raise UserError(f"function '{path}': '{_name_of(found)}' has no '{name}'{near}")
        found = getattr(found, name)
    return found


def _import_module(path: str) -> tuple[ModuleType, list[str]]:
    """Import the longest module that the path starts with; returns it and the remaining names."""
    parts = path.split(".")
    module, depth = _import_one(path, parts[0]), 1
    while depth < len(parts) - 1 and isinstance(getattr(module, parts[depth], module), ModuleType):
        module = _import_one(path, ".".join(parts[: depth + 1]))
        depth += 1
    return module, parts[depth:]


def _import_one(path: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:  # the module exists, but something that it imports does not
            raise UserError(f"function '{path}': importing '{name}' failed: {error}") from error
        parent, _, last = name.rpartition(".")
        places = list(getattr(sys.modules[parent], "__path__", [])) if parent else None
        if parent and not places:
            raise UserError(f"function '{path}': '{parent}' is a module and has no '{last}' in it") from error
        near = _nearest(last, [module.name for module in iter_modules(places)])
        where = f"in package '{parent}'" if parent else f"installed or in the current folder ({Path.cwd()})"
        raise UserError(f"function '{path}': there is no module '{last}' {where}{near}") from error
    except (Exception, SystemExit) as error:
        # A user's module may raise anything while it is imported, or exit.
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"function '{path}': importing '{name}' failed: {reason}") from error


@contextmanager
def _current_folder_first() -> Iterator[None]:
    """Context manager: puts the current folder first on the import path, as ``python -m`` does, and last afterwards.

    Imports inside the user's functions then still work, but the folder no longer hides installed packages.
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
