"""Two processes as launchers start them, and what happens to both when something happens to one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from tests.cli.conftest import _process_as_before, task  # noqa: F401  # fixtures
from tests.cli.task import Task
from tests.training.test_checkpoints import policy

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=2"]


@pytest.fixture
def pair(task: Task) -> Task:  # noqa: F811
    """Four steps on two processes, with an evaluation at each second one and rewards that draw."""
    settings = task.settings()
    settings["trainer"] |= {"max_steps": 4, "val_check_interval": 2, "devices": 2, "strategy": "ddp"}
    settings["data"]["init_args"] |= {"batch_size": 2, "val_batch_size": 2}
    settings["model"]["objectives"]["good"]["reward"]["init_args"]["function"] = "tests.helpers.interruptions.noisy"
    task.config.write_text(yaml.safe_dump(settings))
    return task


def launch(task: Task, root: str, events: str = "", *launcher: str) -> subprocess.CompletedProcess[str]:  # noqa: F811
    """``moa fit`` in a process of its own, by Lightning or by the launcher that is given."""
    started = {"EVENTS": events or "::", "STARTS": str(task.folder / f"{root}.starts")}
    environment = (
        os.environ
        | started
        | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    )
    flags = [
        "fit",
        "--config",
        str(task.config),
        f"--trainer.default_root_dir={task.folder / root}",
        "--ckpt_path=last",
    ]
    command = [sys.executable, *launcher, str(ROOT / "tests" / "helpers" / "launched.py"), *flags]
    return subprocess.run(
        command, check=False, cwd=task.folder, env=environment, capture_output=True, text=True, timeout=500
    )


@pytest.mark.slow
def test_torchrun_starts_again_what_was_asked_to_stop_and_what_was_killed(pair: Task) -> None:
    straight = launch(pair, "straight")
    assert straight.returncode == 0, straight.stderr
    # Calls of the reward on each process: one in the first evaluation, then one in each rollout. The second start goes
    # on at step 1: a rollout, the evaluation, and the rollout in which it is killed.
    restarted = launch(pair, "restarted", "ask:1:2,kill:1:3", *TORCHRUN)
    assert restarted.returncode == 0, restarted.stderr
    saved = f"moa: stopped at step 1 as asked; saved {pair.folder}/restarted/checkpoints/last.ckpt"
    assert saved in restarted.stderr
    assert restarted.stdout.count("ckpt_path=last: resumes from") == 2
    torch.testing.assert_close(policy(pair.folder / "restarted"), policy(pair.folder / "straight"), rtol=0, atol=0)


@pytest.mark.slow
def test_a_process_that_fails_ends_the_other_and_is_named(pair: Task) -> None:
    found = launch(pair, "failed", "fail:1:2")
    assert found.returncode != 0
    assert "the reward of this process is broken" in found.stderr
    assert "moa: process 1 failed with exit code 2" in found.stderr
    assert "moa: error: rank 1: objective 'good'" in found.stderr
    assert "another process has ended" in found.stderr
    assert "defect of moa-lightning" not in found.stderr, "the other process only lost its peer"
