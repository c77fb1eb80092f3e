"""Kill a run at random moments, resume it, and compare where it ends with the run that nobody killed.

    python -m bench.kills [--kills 20] [--seed 0] [--steps 8] [--processes 1] [--strategy ddp] [--keep DIR]

One run of the embedded task goes through without a break. Then, for each kill, the same run is started again, gets
``SIGKILL`` (with all its processes), and is called once more by the same command: with ``--ckpt_path=last`` it goes on
from its last checkpoint, or starts anew where there is none. Each run evaluates and saves after every step. Every
other kill comes at a moment drawn uniformly over the whole run; those between are aimed, at random within the phases
of a run in turn: in a rollout, between it and its update, in an update, in an evaluation, in the writing of a
checkpoint, each of which comes several times in the run. The table says in which phase each kill came, after which
step the run went on, and whether policy and value heads at its end are the first one's to the bit. About a minute for
each kill on two cores.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from bench.kills.trace import PHASES, read
from moa_lightning.training.checkpoints import newest_valid

ROOT = Path(__file__).resolve().parents[2]
POLL_SECONDS = 0.003


@dataclass(frozen=True)
class Moment:
    """When to kill: so many seconds behind the beginning of the nth phase of this name.

    Phases, not seconds behind the start: other work on the machine makes one run slower than the next.
    """

    phase: str
    number: int
    seconds: float

    def has_come(self, trace: Path) -> bool:
        """Whether it is over."""
        times = [at for at, phase in read(trace) if phase == self.phase]
        return len(times) >= self.number and time.monotonic() >= times[self.number - 1] + self.seconds


def draw(number: int, trace: Sequence[tuple[float, str]], end: float, random_numbers: random.Random) -> Moment:
    """The moment of a kill, from the phases of the run that nobody killed."""
    phases, ends = [phase for _, phase in trace], [*(at for at, _ in trace[1:]), end]
    lengths = [until - at for (at, _), until in zip(trace, ends, strict=True)]
    aim = None if number % 2 else PHASES[number // 2 % len(PHASES)]
    weights = lengths if aim is None else [float(phase == aim) for phase in phases]
    (chosen,) = random_numbers.choices(range(len(trace)), weights)
    return Moment(
        phases[chosen], phases[: chosen + 1].count(phases[chosen]), random_numbers.uniform(0, lengths[chosen])
    )


def command(folder: Path, options: argparse.Namespace, steps: int) -> list[str]:
    """A short run of the embedded task with a checkpoint after every step; the same command resumes it."""
    flags = {
        "ckpt_path": "last",
        "trainer.default_root_dir": folder,
        "trainer.max_steps": steps,
        "trainer.val_check_interval": 1,
        "trainer.devices": options.processes,
        "trainer.enable_progress_bar": "false",
        "data.batch_size": 4,
        "data.val_batch_size": 16,
        "data.val_repeats": 2,
        "model.source.num_iterations": 2,
    }
    if options.processes > 1:
        flags["trainer.strategy"] = options.strategy
    own = [f"--{name}={value}" for name, value in flags.items()]
    return [*moa(), "fit", "--config", str(ROOT / "configs/demo.yaml"), *own]


def moa() -> list[str]:
    """The command line of this environment, with a trace."""
    return [sys.executable, "-m", "bench.kills.trace"]


def start(arguments: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """The run, in a session of its own so that all its processes can be killed; the trace is beside the log."""
    trace = log.with_suffix(".trace")
    trace.unlink(missing_ok=True)
    own = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRACE": str(trace)}  # one thread: the models are small
    with log.open("ab") as output:
        return subprocess.Popen(
            arguments, stdout=output, stderr=output, start_new_session=True, env={**os.environ, **own}, cwd=ROOT
        )


def finish(arguments: Sequence[str], log: Path) -> None:
    """Run to the end."""
    if start(arguments, log).wait() != 0:
        raise SystemExit(f"a run failed; see {log}")


def kill(arguments: Sequence[str], log: Path, moment: Moment) -> str:
    """Start a run and kill it; the phase that it was in, or ``ended`` where it was faster."""
    running, trace = start(arguments, log), log.with_suffix(".trace")
    while running.poll() is None and not moment.has_come(trace):
        time.sleep(POLL_SECONDS)
    ended = running.poll() is not None
    if not ended:
        os.killpg(running.pid, signal.SIGKILL)
        running.wait()
    phases = read(trace)
    return "ended" if ended else phases[-1][1] if phases else "starting"


def step_of(folder: Path) -> int | None:
    """Of the newest checkpoint that is whole; ``None`` where there is none."""
    last = newest_valid(folder / "checkpoints")
    return None if last is None else int(torch.load(last, weights_only=True)["global_step"])


def same(one: Path, other: Path) -> bool:
    """Whether two runs ended with the same policy and value heads, to the bit."""
    for name in ("model.safetensors", "value_heads.safetensors"):
        a, b = load_file(one / "policy" / name), load_file(other / "policy" / name)
        if a.keys() != b.keys() or not all(torch.equal(a[key], b[key]) for key in a):
            return False
    return True


def kill_and_resume(
    folder: Path, whole: Path, moment: Moment, arguments: Sequence[str]
) -> tuple[str, int | None, bool]:
    """The phase of the kill, the step that the run went on from (``None``: anew), whether it ended as the other did."""
    log = folder.with_suffix(".log")
    phase = kill(arguments, log, moment)
    step = step_of(folder)
    finish(arguments, log)
    return phase, step, same(folder, whole)


def main(arguments: Sequence[str] | None = None) -> None:
    """Kill, resume, compare, print."""
    parser = argparse.ArgumentParser(prog="python -m bench.kills", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--steps", type=int, default=8, help="of each run")
    parser.add_argument("--processes", type=int, default=1, help="of each run")
    parser.add_argument("--strategy", choices=("ddp", "fsdp2"), default="ddp", help="of several processes")
    parser.add_argument("--keep", type=Path, help="leave runs, logs and traces there")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        root: Path = (options.keep or Path(scratch)).resolve()
        root.mkdir(parents=True, exist_ok=True)
        whole = root / "whole"
        finish(command(root / "warm", options, 1), root / "warm.log")  # builds the policy, if it has to
        finish(command(whole, options, options.steps), root / "whole.log")
        end, trace = time.monotonic(), read(root / "whole.trace")
        random_numbers, matched, phases = random.Random(options.seed), 0, Counter[str]()
        print(f"the whole run: {options.steps} steps, {options.processes} processes, {end - trace[0][0]:.0f} s")
        print(f"{'kill':>4}  {'in phase':<16}{'went on from':>12}   ends alike", flush=True)
        for number in range(1, options.kills + 1):
            moment = draw(number, trace, end, random_numbers)
            folder = root / f"kill-{number}"
            phase, step, alike = kill_and_resume(folder, whole, moment, command(folder, options, options.steps))
            matched, phases[phase] = matched + alike, phases[phase] + 1
            from_where = "the start" if step is None else f"step {step}"
            print(f"{number:4}  {phase:<16}{from_where:>12}   {'yes' if alike else 'NO'}", flush=True)
        print("kills by phase: " + ", ".join(f"{phase} {count}" for phase, count in phases.most_common()))
        print(f"{matched} of {options.kills} ended with the policy of the run that nobody killed, to the bit")
        if matched < options.kills:
            raise SystemExit(1)
