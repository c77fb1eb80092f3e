"""Run many tiny steps and print what grows: memory, open handles, threads and processor time a step, at ten points.

    python -m bench.long_run [--steps 3000] [--interval 50]

A tiny policy on prompts under PAMA, with everything that a run does by default: an evaluation, samples, a front and a
checkpoint after every ``--interval`` steps, a row of metrics after each step. ``RSS`` is the resident memory of the
process and ``objects`` what Python's collector tracks after a full collection. Processor time is the mean over the
steps since the point before, evaluations and saving included.
"""

import argparse
import gc
import os
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Callback, LightningModule, Trainer

from bench.fuzz.run import make, rollouts

POINTS = 10


class Gauge(Callback):
    """Prints the state of the process at a tenth of the run, and at each further one.

    Args:
        every: steps from one point to the next.
    """

    def __init__(self, every: int) -> None:
        super().__init__()
        self.every, self.before = every, 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        print(f"{'steps':>6}{'RSS MiB':>9}{'objects':>9}{'handles':>9}{'threads':>9}{'CPU ms/step':>13}", flush=True)
        self.before = time.process_time()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *batch: Any) -> None:
        """Print."""
        if trainer.global_step % self.every:
            return
        cpu = 1000 * (time.process_time() - self.before) / self.every
        gc.collect()
        handles = len(os.listdir("/proc/self/fd"))
        print(
            f"{trainer.global_step:6}{resident():9.1f}{len(gc.get_objects()):9}{handles:9}"
            f"{threading.active_count():9}{cpu:13.2f}",
            flush=True,
        )
        self.before = time.process_time()


def resident() -> float:
    """Memory of this process in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, printing."""
    parser = argparse.ArgumentParser(prog="python -m bench.long_run", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--interval", type=int, default=50, help="steps from one evaluation to the next")
    options = parser.parse_args(arguments)
    os.environ |= {"HF_HUB_OFFLINE": "1"}
    import torch

    from moa_lightning.cli import main as moa

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make(folder)
        settings = rollouts(folder)
        gauge = {"class_path": "bench.long_run.Gauge", "init_args": {"every": max(options.steps // POINTS, 1)}}
        settings["trainer"] |= {
            "default_root_dir": str(folder / "run"),
            "max_steps": options.steps,
            "val_check_interval": options.interval,
            "callbacks": [gauge],
        }
        (folder / "run.yaml").write_text(yaml.safe_dump(settings))
        moa(["fit", f"--config={folder}/run.yaml"])


if __name__ == "__main__":
    main()
