"""One run, one folder: a lock that names its process, and that is gone with it."""

import atexit
import errno
import json
import os
import socket
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from moa_lightning.errors import UserError

NAME = ".lock"
"""The file in a run's folder."""

_BEAT = 20.0  # seconds between two signs of life
_SILENCE = 180.0  # seconds without one, after which a process on another host counts as gone
_TAKEOVER = 10.0  # seconds after which whoever removes a stale lock was killed at it: it takes milliseconds
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
# A launcher or scheduler that starts a job again counts how often. Before it does, the former processes have ended.
_JOBS = (("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"), ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"))


class FolderInUseError(UserError):
    """Another process runs in the folder."""


@dataclass(frozen=True)
class Holder:
    """The process that a lock names.

    Args:
        host: where it runs.
        pid: its number there.
        started: in ticks since that host booted, where the system says; a number may be used again.
        jobs: by the variable of a launcher, the job and how often it was started again.
    """

    host: str
    pid: int
    started: int | None = None
    jobs: tuple[tuple[str, str, int], ...] = ()

    @classmethod
    def here(cls) -> "Holder":
        """This process."""
        jobs = tuple(
            (name, os.environ[name], int(os.environ.get(count) or 0)) for name, count in _JOBS if os.environ.get(name)
        )
        return cls(socket.gethostname(), os.getpid(), _started(os.getpid()), jobs)

    def is_gone(self, me: "Holder", silence: float) -> bool:
        """Whether this process has certainly ended.

        Args:
            me: who asks.
            silence: seconds since its last sign of life, by the clock of the file system.
        """
        if self.host == me.host:
            return not _alive(self.pid) or (self.started is not None and _started(self.pid) != self.started)
        mine = {name: (job, count) for name, job, count in me.jobs}
        again = any(mine.get(name, ("", 0))[0] == job and mine[name][1] > count for name, job, count in self.jobs)
        return again or silence > _SILENCE


class RunLock:
    """Holds a run's folder for this process until it ends.

    The file is made in one step that fails if it is there, on shared file systems too. A lock of a process that has
    ended is taken over: on this host its number says so, on another one that it gave no sign of life for three minutes,
    or that the same job was started again. A kill leaves the file, and the next start takes it over.

    Args:
        folder: of the run; it exists.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder.absolute() / NAME
        self._released = threading.Event()

    def acquire(self) -> None:
        """Take it.

        Raises:
            FolderInUseError: one line with host and process of the one that runs there.
        """
        while not self._create():
            refuse_if_held(self.path.parent)
            self._take_away()
        atexit.register(self.release)
        threading.Thread(target=self._beat, daemon=True, name="run lock").start()

    def release(self) -> None:
        """Give it back. A second time nothing happens."""
        if not self._released.is_set():
            self._released.set()
            atexit.unregister(self.release)
            with suppress(OSError):  # the folder may be gone
                if _read(self.path) == Holder.here():
                    self.path.unlink()

    def _create(self) -> bool:
        """Make the file with what it says in one step: nobody sees it half written."""
        mine = self.path.with_name(f"{NAME}-{socket.gethostname()}-{os.getpid()}")
        try:
            mine.write_text(json.dumps(asdict(Holder.here())), encoding="utf-8")
            os.link(mine, self.path)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            with suppress(FileExistsError), self.path.open("x", encoding="utf-8") as file:
                file.write(mine.read_text(encoding="utf-8"))
                return True
            return False
        finally:
            mine.unlink(missing_ok=True)
        return True

    def _take_away(self) -> None:
        """Remove a lock whose process has ended.

        One start at a time does so, behind a guard, and looks again first: a lock that another start has made in
        between must not be removed, however late this process is.

        Raises:
            FolderInUseError: another start has made its own.
        """
        guard = self.path.with_name(f"{NAME}-takeover")
        try:
            guard.touch(exist_ok=False)
        except FileExistsError:
            with suppress(FileNotFoundError):
                if _now(self.path.parent) - guard.stat().st_mtime > _TAKEOVER:  # killed before it removed the guard
                    guard.unlink()
            time.sleep(0.01)
            return
        try:
            refuse_if_held(self.path.parent)
            self.path.unlink(missing_ok=True)
        finally:
            guard.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._released.wait(_BEAT):
            with suppress(OSError):
                os.utime(self.path)


def refuse_if_held(folder: Path) -> None:
    """Nothing if no living process runs in a folder.

    Raises:
        FolderInUseError: one line with host and process.
    """
    if (found := holder_of(folder)) is not None:
        raise FolderInUseError(_in_use(folder, found))


def holder_of(folder: Path) -> Holder | None:
    """The living process that runs in a folder, other than this one."""
    return _holder(folder / NAME, folder)


def _in_use(folder: Path, holder: Holder) -> str:
    return (
        f"process {holder.pid} on host {holder.host} runs in {folder} already; wait for its end, or give another "
        f"trainer.default_root_dir. If it has ended, remove {folder / NAME}"
    )


def _holder(lock: Path, folder: Path) -> Holder | None:
    """The living process that a lock names, other than this one."""
    try:
        holder, beaten = _read(lock), lock.stat().st_mtime
    except FileNotFoundError:
        return None
    me = Holder.here()
    if holder is None or holder == me:
        return None
    silence = 0.0 if holder.host == me.host else _now(folder) - beaten
    return None if holder.is_gone(me, silence) else holder


def _read(lock: Path) -> Holder | None:
    """What a lock says; ``None`` where that is not to be read."""
    try:
        said = json.loads(lock.read_text(encoding="utf-8"))
        return Holder(said["host"], said["pid"], said["started"], tuple((n, j, c) for n, j, c in said["jobs"]))
    except (ValueError, KeyError, TypeError):
        return None


def _now(folder: Path) -> float:
    """The time by the clock of the file system, which on a shared one is not this host's."""
    probe = folder / f"{NAME}-clock-{socket.gethostname()}-{os.getpid()}"
    try:
        probe.touch()
        now = probe.stat().st_mtime
        probe.unlink()
    except OSError:
        return time.time()
    return now


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return _state(pid) != "Z"  # a zombie has ended, and waits for its parent


def _state(pid: int) -> str:
    fields = _stat(pid)
    return fields[0] if fields else ""


def _started(pid: int) -> int | None:
    fields = _stat(pid)
    return int(fields[19]) if fields else None


def _stat(pid: int) -> list[str]:
    """The fields behind the name in ``/proc/PID/stat``; empty where there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return text.rpartition(")")[2].split()
