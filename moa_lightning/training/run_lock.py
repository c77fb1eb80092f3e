"""A lock file that keeps a second process out of a run's folder."""

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
"""Name of the lock file in a run's folder."""

_BEAT = 20.0  # seconds between two heartbeats
_SILENCE = 180.0  # seconds without a heartbeat after which a process on another host counts as ended
_TAKEOVER = 10.0  # seconds after which a guard file is stale: removing a lock takes milliseconds
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
# A launcher or scheduler counts how often it has restarted a job. It restarts only after the old processes have ended.
_JOBS = (("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"), ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"))


class FolderInUseError(UserError):
    """Another process is running in the folder."""


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock.

    Args:
        host: name of its host.
        pid: its process id there.
        started: its start time in ticks since boot, if the system has it; tells reused process ids apart.
        jobs: for each launcher: the name of its variable, the job id, and the number of restarts.
    """

    host: str
    pid: int
    started: int | None = None
    jobs: tuple[tuple[str, str, int], ...] = ()

    @classmethod
    def here(cls) -> "Holder":
        """Describe this process."""
        jobs = tuple(
            (name, os.environ[name], int(os.environ.get(count) or 0)) for name, count in _JOBS if os.environ.get(name)
        )
        return cls(socket.gethostname(), os.getpid(), _started(os.getpid()), jobs)

    def is_gone(self, me: "Holder", silence: float) -> bool:
        """Whether this process has certainly ended.

        Args:
            me: who asks.
            silence: seconds since its last heartbeat, by the clock of the file system.
        """
        if self.host == me.host:
            return not _alive(self.pid) or (self.started is not None and _started(self.pid) != self.started)
        mine = {name: (job, count) for name, job, count in me.jobs}
        again = any(mine.get(name, ("", 0))[0] == job and mine[name][1] > count for name, job, count in self.jobs)
        return again or silence > _SILENCE


class RunLock:
    """Locks a run's folder for this process until it ends.

    The file is created atomically, also on shared file systems. The lock of a process that has ended is taken over. On
    this host the process id shows that it has ended; on another host, three minutes without a heartbeat, or a restart
    of the same job. A killed process leaves the file, and the next start takes it over.

    Args:
        folder: of the run; it exists.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder.absolute() / NAME
        self._released = threading.Event()

    def acquire(self) -> None:
        """Acquire the lock.

        Raises:
            FolderInUseError: one line with host and id of the process that holds it.
        """
        while not self._create():
            refuse_if_held(self.path.parent)
            self._remove_stale()
        atexit.register(self.release)
        threading.Thread(target=self._beat, daemon=True, name="run lock").start()

    def release(self) -> None:
        """Release the lock. Further calls do nothing."""
        if not self._released.is_set():
            self._released.set()
            atexit.unregister(self.release)
            with suppress(OSError):  # the folder may be gone
                if _read(self.path) == Holder.here():
                    self.path.unlink()

    def _create(self) -> bool:
        """Create the file with its content atomically, so that nobody reads half of it. Returns False if it exists."""
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

    def _remove_stale(self) -> None:
        """Remove a lock whose process has ended.

        A guard file lets one process at a time do so. It checks the lock again first: a lock that another process has
        created in between must not be removed.

        Raises:
            FolderInUseError: another process has acquired the lock.
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
    """Refuse a folder that another running process holds.

    Raises:
        FolderInUseError: one line with host and process id.
    """
    if (found := holder_of(folder)) is not None:
        raise FolderInUseError(_in_use(folder, found))


def holder_of(folder: Path) -> Holder | None:
    """The other running process that holds a folder, if any."""
    return _holder(folder / NAME, folder)


def _in_use(folder: Path, holder: Holder) -> str:
    return (
        f"process {holder.pid} on host {holder.host} runs in {folder} already; wait for its end, or set another "
        f"trainer.default_root_dir. If it has ended, remove {folder / NAME}"
    )


def _holder(lock: Path, folder: Path) -> Holder | None:
    """The other running process that a lock file names, if any."""
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
    """Parse a lock file; ``None`` if it is damaged."""
    try:
        saved = json.loads(lock.read_text(encoding="utf-8"))
        return Holder(saved["host"], saved["pid"], saved["started"], tuple((n, j, c) for n, j, c in saved["jobs"]))
    except (ValueError, KeyError, TypeError):
        return None


def _now(folder: Path) -> float:
    """The time by the clock of the file system, which may differ from this host's clock."""
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
    except PermissionError:  # another user's
        return True
    return _state(pid) != "Z"  # a zombie has ended and waits for its parent


def _state(pid: int) -> str:
    fields = _stat(pid)
    return fields[0] if fields else ""


def _started(pid: int) -> int | None:
    fields = _stat(pid)
    return int(fields[19]) if fields else None


def _stat(pid: int) -> list[str]:
    """The fields after the name in ``/proc/PID/stat``; empty if there is no such file."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return text.rpartition(")")[2].split()
