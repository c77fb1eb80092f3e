"""One process in a run's folder: of several starts one wins, and nothing of a process that has ended bars the next."""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from moa_lightning.training import run_lock
from moa_lightning.training.run_lock import FolderInUseError, Holder, RunLock, refuse_if_held

CONTEXT = multiprocessing.get_context("fork")


def start(folder, barrier, answers, done):
    barrier.wait()
    lock = RunLock(folder)
    try:
        lock.acquire()
    except FolderInUseError as error:
        answers.put((os.getpid(), str(error)))
        done.wait()
        return
    answers.put((os.getpid(), ""))
    done.wait()
    lock.release()


def ended() -> Holder:
    """A process of this host that is no more."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return replace(Holder.here(), pid=process.pid, started=None)


def write(folder: Path, holder: Holder, age: float = 0.0) -> Path:
    path = folder / run_lock.NAME
    path.write_text(json.dumps(asdict(holder)))
    os.utime(path, (time.time() - age,) * 2)
    return path


@pytest.mark.parametrize("stale", [False, True], ids=["free", "stale"])
@pytest.mark.parametrize("attempt", range(5))
def test_of_eight_starts_at_once_one_wins(tmp_path, stale, attempt):
    if stale:
        write(tmp_path, ended())
    barrier, answers, done = CONTEXT.Barrier(8), CONTEXT.Queue(), CONTEXT.Event()
    processes = [CONTEXT.Process(target=start, args=(tmp_path, barrier, answers, done)) for _ in range(8)]
    for process in processes:
        process.start()
    said = dict(answers.get(timeout=60) for _ in processes)
    done.set()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    winners = [pid for pid, error in said.items() if not error]
    assert len(winners) == 1
    named = f"process {winners[0]} on host {socket.gethostname()} runs in {tmp_path} already"
    assert all(error.startswith(named) for error in said.values() if error)
    assert not list(tmp_path.iterdir()), "the winner gives the folder back"


def test_one_that_is_late_removes_no_new_lock(tmp_path, monkeypatch):
    """It found the lock stale; before it removes it, another start has taken the folder."""
    write(tmp_path, ended())
    late, looked = RunLock(tmp_path), run_lock.refuse_if_held

    def look_and_wait(folder):
        monkeypatch.setattr(run_lock, "refuse_if_held", looked)
        looked(folder)
        write(tmp_path, replace(Holder.here(), pid=os.getppid(), started=run_lock._started(os.getppid())))

    monkeypatch.setattr(run_lock, "refuse_if_held", look_and_wait)
    with pytest.raises(FolderInUseError, match=f"process {os.getppid()} on host"):
        late.acquire()
    assert [path.name for path in tmp_path.iterdir()] == [run_lock.NAME]


def test_a_guard_that_a_kill_left_bars_nobody(tmp_path):
    write(tmp_path, ended())
    guard = tmp_path / f"{run_lock.NAME}-takeover"
    guard.touch()
    os.utime(guard, (time.time() - 60,) * 2)
    lock = RunLock(tmp_path)
    lock.acquire()
    lock.release()
    assert not list(tmp_path.iterdir())


def test_a_killed_process_bars_nobody(tmp_path):
    program = (
        f"import time; from pathlib import Path; from moa_lightning.training.run_lock import RunLock; "
        f"RunLock(Path({str(tmp_path)!r})).acquire(); print('held', flush=True); time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    with pytest.raises(FolderInUseError, match=f"process {process.pid} on host"):
        RunLock(tmp_path).acquire()
    with pytest.raises(FolderInUseError, match=f"process {process.pid} on host"):
        refuse_if_held(tmp_path)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert (tmp_path / run_lock.NAME).exists()
    refuse_if_held(tmp_path)
    lock = RunLock(tmp_path)
    lock.acquire()
    RunLock(tmp_path).acquire()  # this process may run in it twice, one after the other
    lock.release()
    lock.release()
    assert not list(tmp_path.iterdir())


def test_a_number_that_is_used_again_is_another_process(tmp_path):
    me = Holder.here()
    if me.started is None:
        pytest.skip("this system does not say when a process started")
    parent = replace(me, pid=os.getppid(), started=run_lock._started(os.getppid()))
    assert not parent.is_gone(me, 0.0)
    assert replace(parent, started=0).is_gone(me, 0.0)


@pytest.mark.parametrize(("age", "gone"), [(10.0, False), (170.0, False), (200.0, True)])
def test_a_process_on_another_host_counts_as_gone_when_it_is_silent(tmp_path, age, gone):
    write(tmp_path, Holder("elsewhere", 12, 34), age)
    if gone:
        refuse_if_held(tmp_path)
        lock = RunLock(tmp_path)
        lock.acquire()
        lock.release()
    else:
        with pytest.raises(FolderInUseError, match=r"process 12 on host elsewhere .* If it has ended, remove .*\.lock"):
            RunLock(tmp_path).acquire()
        assert run_lock._read(tmp_path / run_lock.NAME) == Holder("elsewhere", 12, 34)


def test_a_job_that_was_started_again_takes_its_folder_back(tmp_path, monkeypatch):
    """A node died; the scheduler starts the job on another one."""
    for variable in ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(variable, raising=False)
    write(tmp_path, Holder("elsewhere", 12, 34, (("SLURM_JOB_ID", "7", 0),)))
    for job, count in (("7", None), ("8", "1")):  # the first start of the same job, and another job
        monkeypatch.setenv("SLURM_JOB_ID", job)
        if count is not None:
            monkeypatch.setenv("SLURM_RESTART_COUNT", count)
        with pytest.raises(FolderInUseError):
            refuse_if_held(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    refuse_if_held(tmp_path)


def test_a_living_process_gives_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "_BEAT", 0.01)
    lock = RunLock(tmp_path)
    lock.acquire()
    os.utime(lock.path, (0, 0))
    for _ in range(500):
        if lock.path.stat().st_mtime > 0:
            break
        time.sleep(0.01)
    assert lock.path.stat().st_mtime > 0
    lock.release()


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"host": 1'])
def test_what_is_no_lock_bars_nobody(tmp_path, content):
    (tmp_path / run_lock.NAME).write_text(content)
    lock = RunLock(tmp_path)
    lock.acquire()
    assert run_lock._read(lock.path) == Holder.here()
    lock.release()
