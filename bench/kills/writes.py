"""What a run writes, in order, and its death at any of it: in this process, around ``open``, ``os.replace`` and others.

A process that dies in the middle of a write leaves a part of the file. Here the part is drawn: what is written is kept
back until the file is closed, and then a fraction of it reaches the disk before ``SIGKILL``. Without a place to die at,
the run only notes what it does.
"""

import builtins
import io
import os
import re
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WHEN = ("before", "during", "after")
TARGETS = (
    "checkpoint",
    "last.ckpt",
    "best.ckpt",
    "metrics.csv",
    "samples.jsonl",
    "front.csv",
    "front.png",
    "summary.json",
    "policy",
    "config.yaml",
)
"""The files of a run folder; ``checkpoint`` is one named by its step."""


@dataclass(frozen=True)
class Death:
    """Where to die.

    Args:
        number: of the operation, from 0.
        when: one of ``WHEN``; an operation of the system, such as a rename, has no middle: it counts as after it.
        fraction: of what is written that reaches the disk, where the file is cut.
    """

    number: int
    when: str = "before"
    fraction: float = 0.5


def die() -> None:
    """End as the kernel ends a process that takes too much memory."""
    os.kill(os.getpid(), signal.SIGKILL)


def target_of(path: Path) -> str | None:
    """Which of ``TARGETS`` a path in the run folder belongs to, also while it lies beside its place."""
    parts = path.parts
    if parts and parts[0].lstrip(".").startswith("policy"):
        return "policy"
    name = re.sub(r"(\.\d+)?\.partial$|\.former$", "", path.name.lstrip("."))
    if name.startswith("step-"):
        return "checkpoint"
    return name if name in TARGETS else None


class Writes:
    """Notes the operations of this process in a run folder, and dies at one of them.

    Args:
        root: the run folder.
        death: where to die; ``None`` lives on.
        log: a file that gets a line ``operation target`` for each.
    """

    def __init__(self, root: Path, death: Death | None, log: Path) -> None:
        self.root, self.death, self.log, self.number = root.resolve(), death, log, -1
        self.open: Callable[..., Any] = builtins.open

    def install(self) -> None:
        """Take the place of what writes; for the rest of the process."""
        import safetensors.torch

        builtins.open = io.open = self._opened  # type: ignore[assignment]
        for owner, name in ((os, "replace"), (os, "rename"), (os, "unlink"), (shutil, "rmtree")):
            setattr(owner, name, self._around(getattr(owner, name), name))
        safetensors.torch.serialize_file = self._serialized(safetensors.torch.serialize_file)

    def begin(self, path: Any, operation: str) -> Death | None:
        """Note an operation; the death if it is to come here. Dies here where that is before it."""
        if isinstance(path, int):
            return None
        absolute = Path(os.fsdecode(path)).absolute()
        target = target_of(absolute.relative_to(self.root)) if absolute.is_relative_to(self.root) else None
        if target is None:
            return None
        self.number += 1
        with self.open(self.log, "a") as file:
            file.write(f"{operation} {target}\n")
        if self.death is None or self.death.number != self.number:
            return None
        if self.death.when == "before":
            die()
        return self.death

    def _opened(self, path: Any, mode: str = "r", *rest: Any, **more: Any) -> Any:
        death = self.begin(path, "write") if set(mode) & set("wax") else None
        file = self.open(path, mode, *rest, **more)
        return file if death is None else Cut(file, death.fraction if death.when == "during" else 1.0)

    def _around(self, operation: Callable[..., Any], name: str) -> Callable[..., Any]:
        def done(path: Any, *rest: Any, **more: Any) -> Any:
            death = self.begin(path, name)
            try:
                return operation(path, *rest, **more)
            finally:  # also where there was nothing to remove
                if death is not None:
                    die()

        return done

    def _serialized(self, write: Callable[..., Any]) -> Callable[..., Any]:
        def done(tensors: Any, path: Any, *rest: Any, **more: Any) -> Any:
            death = self.begin(path, "write")
            result = write(tensors, path, *rest, **more)
            if death is not None:
                if death.when == "during":
                    os.truncate(path, int(death.fraction * os.path.getsize(path)))
                die()
            return result

        return done


class Cut:
    """An open file of which a fraction is written when it is closed, and then the process dies."""

    def __init__(self, file: Any, fraction: float) -> None:
        self.file, self.fraction, self.parts = file, fraction, []  # type: ignore[var-annotated]

    def write(self, data: Any) -> int:
        """Keep it back."""
        self.parts.append(data if isinstance(data, str) else bytes(data))
        return len(data)

    def close(self) -> None:
        """Write the fraction, and die."""
        if self.parts:
            whole = self.parts[0][:0].join(self.parts)
            self.file.write(whole[: int(self.fraction * len(whole))])
        self.file.flush()
        die()

    def flush(self) -> None:
        """Nothing is written before the end."""

    def __enter__(self) -> "Cut":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __getattr__(self, name: str) -> Any:
        if name == "fileno":  # what asks for it would write behind this file's back
            raise AttributeError(name)
        return getattr(self.file, name)
