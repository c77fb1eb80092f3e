"""Kill a run at random moments, resume it, and compare where it ends with the run that nobody killed.

    python -m bench.kills [--kills 20] [--seed 0] [--steps 8] [--processes 1] [--keep DIR]

One run of the embedded task goes through without a break. Then, for each kill, the same run is started anew, gets
``SIGKILL`` (with all its processes) at a moment drawn uniformly over the first one's time, and goes on from its last
checkpoint by the command that the README gives; killed before there is one, it starts anew. Each run evaluates and
saves after every step, so that kills fall into rollouts, updates, evaluations and the writing of checkpoints alike.
The table says at which second each was killed, after which step it went on, and whether the policy that it ends with
is the first one's to the bit. About half a minute for each kill on two cores.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]


def command(folder: Path, steps: int, processes: int) -> list[str]:
    """A short run of the embedded task with a checkpoint after every step."""
    flags = {
        "trainer.default_root_dir": folder,
        "trainer.max_steps": steps,
        "trainer.val_check_interval": 1,
        "trainer.devices": processes,
        "trainer.enable_progress_bar": "false",
        "data.batch_size": 4,
        "data.val_batch_size": 16,
        "model.source.num_iterations": 2,
    }
    own = [f"--{name}={value}" for name, value in flags.items()]
    return [*moa(), "fit", "--config", str(ROOT / "configs/demo.yaml"), *own]


def moa() -> list[str]:
    """The command line of this environment."""
    return [sys.executable, "-c", "from moa_lightning.cli import main; main()"]


def resume(folder: Path) -> list[str] | None:
    """As the README has it; ``None`` where there is nothing to go on from."""
    last = folder / "checkpoints/last.ckpt"
    if not (last.exists() and (folder / "config.yaml").exists()):
        return None
    return [*moa(), "fit", "--config", str(folder / "config.yaml"), "--ckpt_path", str(last)]


def start(arguments: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """The run, in a session of its own so that all its processes can be killed."""
    with log.open("ab") as output:
        return subprocess.Popen(arguments, stdout=output, stderr=output, start_new_session=True, env=environment())


def environment() -> dict[str, str]:
    """One thread: the models are small."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def finish(arguments: Sequence[str], log: Path) -> None:
    """Run to the end."""
    if start(arguments, log).wait() != 0:
        raise SystemExit(f"a run failed; see {log}")


def step_of(folder: Path) -> int | None:
    """Of the last checkpoint."""
    last = folder / "checkpoints/last.ckpt"
    return int(torch.load(last, weights_only=True)["global_step"]) if last.exists() else None


def same(one: Path, other: Path) -> bool:
    """Whether two runs ended with the same policy and value heads, to the bit."""
    for name in ("model.safetensors", "value_heads.safetensors"):
        a, b = load_file(one / "policy" / name), load_file(other / "policy" / name)
        if a.keys() != b.keys() or not all(torch.equal(a[key], b[key]) for key in a):
            return False
    return True


def kill_and_resume(folder: Path, whole: Path, after: float, steps: int, processes: int) -> tuple[int | None, bool]:
    """The step that it went on from (``None``: anew), and whether it ended where the other one did."""
    log = folder.with_suffix(".log")
    running = start(command(folder, steps, processes), log)
    try:
        running.wait(timeout=after)
    except subprocess.TimeoutExpired:
        os.killpg(running.pid, signal.SIGKILL)
        running.wait()
    step = step_of(folder)
    finish(resume(folder) or command(folder, steps, processes), log)
    return step, same(folder, whole)


def main(arguments: Sequence[str] | None = None) -> None:
    """Kill, resume, compare, print."""
    parser = argparse.ArgumentParser(prog="python -m bench.kills", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--steps", type=int, default=8, help="of each run")
    parser.add_argument("--processes", type=int, default=1, help="of each run, with DDP")
    parser.add_argument("--keep", type=Path, help="leave runs and logs there")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        root = options.keep or Path(scratch)
        root.mkdir(parents=True, exist_ok=True)
        whole = root / "whole"
        finish(command(root / "warm", 1, options.processes), root / "warm.log")  # builds the policy, if it has to
        began = time.monotonic()
        finish(command(whole, options.steps, options.processes), root / "whole.log")
        seconds, draw, matched = time.monotonic() - began, random.Random(options.seed), 0
        print(f"the whole run: {options.steps} steps, {seconds:.0f} s")
        print(f"{'kill':>4}{'at s':>8}{'went on from':>16}   ends alike")
        for number in range(1, options.kills + 1):
            after = draw.uniform(0, seconds)
            step, alike = kill_and_resume(root / f"kill-{number}", whole, after, options.steps, options.processes)
            matched += alike
            from_where = "the start" if step is None else f"step {step}"
            print(f"{number:4}{after:8.1f}{from_where:>16}   {'yes' if alike else 'NO'}", flush=True)
        print(f"{matched} of {options.kills} ended with the policy of the run that nobody killed, to the bit")
        if matched < options.kills:
            raise SystemExit(1)


if __name__ == "__main__":
    main()
