"""Two nodes, one of which is lost and comes back: the same curve and the same weights as a run that nothing disturbed.

Two torchrun agents on loopback with one process each stand for the nodes; under SLURM two tasks.
"""

import csv
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.cli import task as tasks
from tests.helpers import processes

ROOT = Path(__file__).resolve().parents[2]
STEPS = 8
SRUN = """#!/usr/bin/env bash
# Two tasks, each on a node of its own; ends with the highest of their codes, as srun does.
while [[ $1 == --* ]]; do shift; done
export SLURM_NTASKS=2 SLURM_LOCALID=0 SLURM_JOB_NAME=moa SLURM_NODELIST=127.0.0.1
for task in 0 1; do
    SLURM_PROCID=$task SLURM_NODEID=$task "$@" & tasks[task]=$!
done
echo "${tasks[@]}" > "$TASKS"
highest=0
for task in "${tasks[@]}"; do
    wait "$task"
    code=$?
    ((code > highest)) && highest=$code
done
exit "$highest"
"""


def slow_goodness(prompts: list[str], completions: list[str], **columns: list[Any]) -> list[float | None]:
    """Leaves a test the time to catch the run in the middle."""
    time.sleep(0.1)
    return tasks.goodness(prompts, completions, **columns)


def environment(**more: str) -> dict[str, str]:
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "PET_", "MOA"))}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    # A node that is silent for two seconds is gone, for a test; torchrun waits for fifteen.
    beats = {"PET_RDZV_CONF": "keep_alive_interval=1,keep_alive_max_attempt=2", "PET_MONITOR_INTERVAL": "0.05"}
    return plain | {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | beats | more


def kill_with_children(agent: subprocess.Popen[bytes]) -> None:
    """What a node does that loses its power; torchrun gives each process a session of its own."""
    children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    for pid in (agent.pid, *map(int, children)):
        os.kill(pid, signal.SIGKILL)
    assert children
    agent.wait()


def wait_until_it_listens(port: int) -> None:
    limit = time.monotonic() + 60
    with socket.socket() as connection:
        while connection.connect_ex(("127.0.0.1", port)):
            assert time.monotonic() < limit
            time.sleep(0.05)


class Run:
    """A run of two processes in a folder of its own."""

    def __init__(self, folder: Path, name: str) -> None:
        self.root, self.log = folder / name, folder / f"{name}.log"
        self.options = ["--config", str(folder / "nodes.yaml"), "--config", str(ROOT / "configs/trainer/fsdp.yaml")]
        self.options += ["--trainer.accelerator=cpu", f"--trainer.default_root_dir={self.root}"]
        self.options += ["--checkpoint.monitor=pareto/hypervolume", "--checkpoint.mode=max"]
        self.options += ["--checkpoint.save_top_k=-1"]

    def start(self, **more: str) -> subprocess.Popen[bytes]:
        """A node: a session of its own, so that it can be lost as a whole."""
        command = [str(ROOT / "scripts/torchrun.sh"), "fit", *self.options, "--ckpt_path=last"]
        return self.begin(command, environment(**more))

    def begin(self, command: list[str], env: dict[str, str]) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as log:
            return subprocess.Popen(command, env=env, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)

    def checkpoints(self) -> list[Path]:
        return sorted((self.root / "checkpoints").glob("step-*.ckpt"))

    def wait_for_a_checkpoint(self) -> None:
        limit = time.monotonic() + 120
        while not self.checkpoints():
            assert time.monotonic() < limit, self.log.read_text()
            time.sleep(0.02)

    def losses(self) -> list[tuple[str, str]]:
        with (self.root / "metrics.csv").open(newline="") as file:
            return [(row["step"], row["loss"]) for row in csv.DictReader(file) if row["loss"]]

    def weights(self) -> bytes:
        return (self.root / "policy" / "model.safetensors").read_bytes()

    def assert_same(self, other: "Run") -> None:
        """No step is lost; one that was done twice came out twice as it was."""
        assert dict(self.losses()) == dict(other.losses())
        assert set(self.losses()) == set(other.losses())
        assert self.weights() == other.weights()
        saved = [torch.load(run.root / f"checkpoints/step-{STEPS}.ckpt", weights_only=True) for run in (self, other)]
        torch.testing.assert_close(saved[0]["state_dict"], saved[1]["state_dict"], rtol=0, atol=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nodes")
    settings = tasks.make(folder).settings()
    settings["trainer"] |= {"max_steps": STEPS}
    settings["model"]["objectives"]["good"]["reward"]["init_args"]["function"] = f"{__name__}.slow_goodness"
    (folder / "nodes.yaml").write_text(yaml.safe_dump(settings))
    return folder


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> Run:
    """On one node, by the script that is for one node or several."""
    run = Run(folder, "undisturbed")
    assert run.start(PROCESSES="2", LOGS=str(folder / "logs")).wait() == 0, run.log.read_text()
    return run


@pytest.mark.slow
def test_a_run_of_two_processes_prints_once_and_keeps_the_logs_of_both(undisturbed: Run, folder: Path) -> None:
    assert dict(undisturbed.losses()).keys() == {str(step) for step in range(STEPS)}
    printed = undisturbed.log.read_text()
    assert printed.count("ckpt_path=last: starts in") == 1
    assert "[default0]:" in printed
    assert "[default1]:" not in printed
    assert "sync_dist" not in printed
    assert "Traceback" not in printed
    first, second = (next((folder / "logs").rglob(f"attempt_0/{rank}/stderr.log")).read_text() for rank in range(2))
    assert "MEMBER: 1/2" in first
    assert "MEMBER: 2/2" in second


@pytest.mark.slow
def test_a_node_that_was_lost_comes_back_and_nothing_has_changed(undisturbed: Run, folder: Path) -> None:
    run, port = Run(folder, "nodes"), str(processes.free_port())
    both = {"NNODES": "2", "PROCESSES": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "MAX_RESTARTS": "3"}
    first = run.start(**both)
    wait_until_it_listens(int(port))  # the first node keeps the meeting point
    second = run.start(**both)
    run.wait_for_a_checkpoint()
    kill_with_children(second)
    reached = len(run.checkpoints())
    again = run.start(**both)
    assert (first.wait(), again.wait()) == (0, 0), run.log.read_text()
    assert 1 <= reached < STEPS
    assert "ckpt_path=last: resumes from" in run.log.read_text()
    run.assert_same(undisturbed)


@pytest.mark.slow
def test_a_preempted_slurm_job_goes_back_into_the_queue_and_on_from_there(undisturbed: Run, folder: Path) -> None:
    for name, stub in {"srun": SRUN, "scontrol": '#!/usr/bin/env bash\necho "$*" >> "$CALLS"\n'}.items():
        (folder / name).write_text(stub)
        (folder / name).chmod(0o755)
    run = Run(folder, "slurm")
    job = {"SLURM_JOB_ID": "41", "SLURM_NTASKS_PER_NODE": "1", "SLURM_NNODES": "2", "SLURM_JOB_NUM_NODES": "2"}
    job |= {"TASKS": str(folder / "tasks"), "CALLS": str(folder / "calls"), "MASTER_PORT": str(processes.free_port())}
    env = environment(**job)
    env["PATH"] = f"{folder}{os.pathsep}{env['PATH']}"
    script = ["bash", str(ROOT / "scripts/slurm.sbatch"), *run.options]

    preempted = run.begin(script, env)
    run.wait_for_a_checkpoint()
    for pid in map(int, (folder / "tasks").read_text().split()):
        os.kill(pid, signal.SIGTERM)
    assert preempted.wait() == 75, run.log.read_text()
    assert (folder / "calls").read_text() == "requeue 41\n"
    assert len(run.checkpoints()) < STEPS

    assert run.begin(script, env).wait() == 0, run.log.read_text()
    assert (folder / "calls").read_text() == "requeue 41\n"
    run.assert_same(undisturbed)
