"""Runs of the demo as processes, several at a time."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from moa_lightning.commands.demo.runs import is_finished, steps_done
from moa_lightning.errors import UserError
from moa_lightning.utils.console import shows_progress

_MOA = (sys.executable, "-P", "-m", "moa_lightning.cli")  # -P: no file of the working directory hides a library
_LOOK = 0.25  # seconds between two looks at the processes
_PATIENCE = 20.0  # seconds in which a run that is asked to stop saves what it has
_LAST_LINES = 12


class State(StrEnum):
    """What a run is doing."""

    WAITS = "waits"
    STARTS = "starts"
    TRAINS = "trains"
    FINISHED = "finished"
    KEPT = "kept"


@dataclass
class Training:
    """One run of ``moa fit`` in a process of its own.

    Args:
        folder: of the run; what the process prints is in ``log.txt`` there.
        asked: what the run is for, in words.
        flags: of ``moa fit``.
        steps: updates that it makes.
    """

    folder: Path
    asked: str
    flags: Sequence[str]
    steps: int
    process: "subprocess.Popen[bytes] | None" = field(default=None, init=False)
    started: float = field(default=0.0, init=False)

    @property
    def log(self) -> Path:
        """What the process printed."""
        return self.folder / "log.txt"

    def start(self) -> None:
        """Begin the run, or resume it from its last checkpoint."""
        self.folder.mkdir(parents=True, exist_ok=True)
        place = (f"--trainer.default_root_dir={self.folder}", "--trainer.enable_progress_bar=false", "--ckpt_path=last")
        with self.log.open("ab") as file:
            self.process = subprocess.Popen(
                [*_MOA, "fit", *self.flags, *place],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env={"OMP_NUM_THREADS": "1", **os.environ},
                process_group=0,  # Ctrl-C reaches the demo alone, which asks its runs to save and stop
            )
        self.started = time.monotonic()

    def state(self) -> State:
        """What it is doing.

        Raises:
            UserError: the process failed.
        """
        if self.process is None:
            return State.KEPT if is_finished(self.folder, self.steps) else State.WAITS
        code = self.process.poll()
        if code is None:
            return State.TRAINS if steps_done(self.folder) else State.STARTS
        if code:
            raise UserError(f"run {self.folder.name} failed with exit code {code}; its log is {self.log}")
        return State.FINISHED

    def last_lines(self) -> str:
        """Of what the process printed."""
        if not self.log.is_file():
            return ""
        return "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LAST_LINES:])


def train(runs: Sequence[Training], jobs: int, console: Console) -> None:
    """Bring all runs to their end, ``jobs`` at a time; finished ones are kept, interrupted ones resumed.

    On a terminal each run has a line with a bar; elsewhere a line is printed where a run starts or ends. When this
    returns or raises, no process is left. If this process is killed at once (``SIGKILL``), its runs train to their end.

    Raises:
        UserError: a run failed; the last lines of its log are printed before.
        KeyboardInterrupt: on Ctrl-C, and where this process is asked to end.
    """
    bars = _Bars(runs, console)
    waiting = [run for run in runs if not is_finished(run.folder, run.steps)]
    active: list[Training] = []
    with _signals_interrupt(), bars.shown():
        try:
            while waiting or active:
                while waiting and len(active) < jobs:
                    active.append(waiting.pop(0))
                    active[-1].start()
                time.sleep(_LOOK)
                bars.update()
                active = [run for run in active if run.state() is not State.FINISHED]
        except UserError:
            failed = next(run for run in active if run.process is not None and run.process.poll())
            console.print(f"\n{failed.last_lines()}\n")
            raise
        finally:
            _stop([run.process for run in runs if run.process is not None])


class _Bars:
    """One line for each run."""

    def __init__(self, runs: Sequence[Training], console: Console) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description}"),
            TextColumn("{task.fields[asked]}", style="dim"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            console=console,
            disable=not shows_progress(),
        )
        self._tasks = {
            self._progress.add_task(run.folder.name, total=run.steps, asked=run.asked, state=State.WAITS): run
            for run in runs
        }
        self._last = dict.fromkeys(self._tasks, State.WAITS)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Context manager: the lines are there, and right at the end."""
        with self._progress:
            self.update()
            yield
            self.update()

    def update(self) -> None:
        """Show what each run is doing now."""
        for task, run in self._tasks.items():
            state = run.state()
            changed, self._last[task] = state is not self._last[task], state
            done = min(steps_done(run.folder), run.steps)
            if not changed:
                self._progress.update(task, completed=done)
                continue
            words = f"{state} in {time.monotonic() - run.started:.0f} s" if state is State.FINISHED else str(state)
            self._progress.update(task, completed=done, state=words)
            if self._progress.disable:
                self._console.print(f"{run.folder.name} ({run.asked}) {words}")


@contextmanager
def _signals_interrupt() -> Iterator[None]:
    """Context manager: a signal that asks this process to end does what Ctrl-C does.

    A signal that the process ignores stays ignored: ``nohup`` asks for that with ``SIGHUP``.
    """

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    heeded = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, interrupt) for number in heeded}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(processes: "Sequence[subprocess.Popen[bytes]]") -> None:
    """End them: with time to save, and at once on a second Ctrl-C."""
    until = time.monotonic() + _PATIENCE
    for process in processes:
        process.terminate()
    try:
        for process in processes:
            process.wait(max(0.0, until - time.monotonic()))
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        for process in processes:
            process.kill()
    for process in processes:
        process.wait()
