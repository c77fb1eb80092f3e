"""A reward that draws, and does something to its process at a given call."""

import os
import random
import signal
from collections.abc import Callable
from typing import Any

from tests.cli.task import goodness

calls = 0
plan: dict[int, Callable[[], Any]] = {}


def begin(when: int = 0, what: Callable[[], Any] | None = None) -> None:
    """Count from here; at that call, do it."""
    global calls  # noqa: PLW0603
    calls = 0
    plan.clear()
    if what is not None:
        plan[when] = what


def ask() -> None:
    """What a cluster sends before it takes a node away."""
    os.kill(os.getpid(), signal.SIGTERM)


def noisy(prompts: list[str], completions: list[str], **columns: list[Any]) -> list[float | None]:
    """Good words minus bad ones, give or take."""
    global calls  # noqa: PLW0603
    calls += 1
    plan.get(calls, int)()
    return [value + random.random() / 10 for value in goodness(prompts, completions) if value is not None]
