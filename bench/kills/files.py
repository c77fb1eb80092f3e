"""Kill runs of every combiner with a memory while they write each of their files; resume, and compare every file.

    python -m bench.kills.files [--kills 40] [--seed 0] [--steps 5] [--only MOPO] [--keep DIR]

MOPO on rollouts and on preference rows, CAID, Lagrangian, CTWA, DynamicWeights and PAMA, each with all weights trained
and with LoRA, evaluate and save after every step. One run of each goes through without a break. Then, for each kill,
the same run is started again and dies by ``SIGKILL`` before, during or after the writing of one of its files (in turn:
a checkpoint by step, ``last.ckpt``, ``best.ckpt``, ``metrics.csv``, ``samples.jsonl``, ``front.csv``, ``front.png``,
``summary.json``, ``policy/``, ``config.yaml``), or at a moment drawn uniformly over the run. The same command, with
``--ckpt_path=last``, brings it to its end. It ends alike if

* every file of ``policy/`` and ``front.csv`` are the same to the byte,
* weights, optimiser, combiner and KL state in ``last.ckpt`` and ``best.ckpt`` are the same to the bit, and the folder
  holds the same files,
* ``metrics.csv`` says for each step all that the unbroken run says (seconds and speeds aside), and ``samples.jsonl``
  has every line of it. Neither says anything else; a step may stand twice, as the run did it twice.

The models are tiny, and each run is a fork of one process that has its imports behind it: a kill takes a few seconds.
"""

import argparse
import csv
import importlib
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml

from bench.fuzz.run import make, preferences, rollouts
from bench.kills.writes import TARGETS, WHEN, Death, Writes

SPEEDS = ("seconds", "per_second", "throughput/")  # in the names of metrics that no two runs share
MOMENT = "a moment"
Settings = dict[str, Any]


@dataclass(frozen=True)
class Kind:
    """One kind of run: a combiner on a source, with all weights trained or LoRA."""

    name: str
    lora: bool
    settings: Callable[[Path], Settings]

    def __str__(self) -> str:
        return f"{self.name}, {'LoRA' if self.lora else 'full'}"

    def command(self, shared: Path, root: Path, steps: int) -> list[str]:
        """Arguments of ``moa`` for a run in ``root``."""
        settings = self.settings(shared)
        if self.lora:
            settings["model"]["policy"]["lora"] = {"r": 2, "lora_alpha": 4, "lora_dropout": 0.1}
        settings["trainer"] |= {"default_root_dir": str(root), "max_steps": steps}
        file = root.with_suffix(".yaml")
        file.write_text(yaml.safe_dump(settings))
        return ["fit", f"--config={file}", "--ckpt_path=last"]


def with_combiner(combiner: str, more: Mapping[str, Any] = {}, **fields: Any) -> Callable[[Path], Settings]:
    """Settings of a run on rollouts under a combiner; ``more`` are further parts of the module."""

    def settings(folder: Path) -> Settings:
        found = rollouts(folder)
        found["model"] |= {"combiner": {"class_path": combiner, "init_args": fields}, **more}
        found["model"]["source"]["init_args"]["num_generations"] = 4
        return found

    return settings


WEIGHTED = {
    "loss": {"class_path": "WeightedLikelihood"},
    "kl": {"class_path": "LossKL", "init_args": {"beta": 0.0}},
}
THRESHOLD = {"short": 10.0}  # out of reach, so that the multiplier moves
KINDS = [
    Kind(name, lora, settings)
    for lora in (False, True)
    for name, settings in (
        ("MOPO", with_combiner("MOPO", WEIGHTED, refresh_interval=2)),
        ("MOPO on preferences", preferences),
        ("CAID", with_combiner("CAID", thresholds=THRESHOLD, reference_batches=2)),
        ("Lagrangian", with_combiner("Lagrangian", thresholds=THRESHOLD)),
        ("CTWA", with_combiner("CTWA", lr=0.5)),
        ("DynamicWeights", with_combiner("DynamicWeights", lr=0.5, interval=1, growth_scale=1.0)),
        ("PAMA", with_combiner("PAMA")),
    )
]


def start(action: Callable[[], None], log: Path) -> int:
    """Number of a fork of this process that does it."""
    child = os.fork()
    if child == 0:
        _act(action, log)
    return child


def fork(action: Callable[[], None], log: Path, seconds: float | None = None) -> int:
    """Exit code of an action in a fork of this process, negative for a signal; killed after ``seconds``."""
    child = start(action, log)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _act(action: Callable[[], None], log: Path) -> NoReturn:
    code = 1
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        action()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:  # noqa: BLE001 - of whatever kind, it is in the log
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # the fork has nothing of its own to end


def run(arguments: Sequence[str], root: Path, death: Death | None = None, seconds: float | None = None) -> int:
    """A run in a fork; its operations are noted beside its folder."""

    def action() -> None:
        from moa_lightning.cli import main

        torch.set_num_threads(1)
        Writes(root, death, root.with_suffix(".writes")).install()
        main(arguments)

    return fork(action, root.with_suffix(".log"), seconds)


def operations(root: Path) -> list[str]:
    """Targets of a run's operations, in order."""
    return [line.split(" ", 1)[1] for line in root.with_suffix(".writes").read_text().splitlines()]


def differences(root: Path, whole: Path) -> list[str]:
    """How a run's end differs from that of the one that nobody killed; empty where it does not.

    Args:
        root: the run.
        whole: the one that nobody killed.
    """
    found = []
    if _files(root / "policy") != _files(whole / "policy"):
        found.append("policy/")
    if (root / "front.csv").read_bytes() != (whole / "front.csv").read_bytes():
        found.append("front.csv")
    for name in sorted({"last.ckpt", "best.ckpt"} & {path.name for path in (whole / "checkpoints").iterdir()}):
        if not (root / "checkpoints" / name).exists():
            found.append(f"no {name}")
        elif unequal := _unequal(_state(root / "checkpoints" / name), _state(whole / "checkpoints" / name)):
            found.append(f"{name}: {len(unequal)} values, such as {', '.join(unequal[-3:])}")
    if unlike := _names(root) ^ _names(whole):
        found.append(f"files {sorted(unlike)}")
    rows, expected = _metrics(root), _metrics(whole)
    found += [f"metrics.csv: lost {cell}" for cell in sorted(expected - rows)[:3]]
    found += [f"metrics.csv: else {cell}" for cell in sorted(rows - expected)[:3]]
    lines, wanted = _samples(root), _samples(whole)
    found += [f"samples.jsonl: lost {line[:60]}" for line in list(wanted - lines)[:3]]
    found += [f"samples.jsonl: else {line[:60]}" for line in set(lines) - set(wanted)]
    if _summary(root) != _summary(whole):
        found.append("summary.json")
    return found


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def _names(root: Path) -> set[str]:
    """All files of a run, hidden ones too: nothing half-written is left."""
    return {str(path.relative_to(root)) for path in root.rglob("*")}


def _state(file: Path) -> dict[str, Any]:
    saved = torch.load(file, weights_only=True)
    kept = {name: saved["moa"][name] for name in ("combiner_state", "kl_state", "reference", "progress")}
    return {
        "weights": saved["state_dict"],
        "optimizer": saved["optimizer_states"],
        "step": saved["global_step"],
        **kept,
    }


def _unequal(a: Any, b: Any, name: str = "") -> list[str]:
    """Paths of the leaves in which two nested values differ."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a.nan_to_num(-9e9), b.nan_to_num(-9e9)) else [name]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        a, b = dict(enumerate(a)), dict(enumerate(b))
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            return [name]
        return [path for key in a for path in _unequal(a[key], b[key], f"{name}/{key}")]
    return [] if a == b or (a != a and b != b) else [name]  # NaN is as good as NaN


def _metrics(root: Path) -> set[tuple[str, str, str]]:
    """Every step, column and value."""
    with (root / "metrics.csv").open(newline="") as file:
        return {
            (row["step"], name, value)
            for row in csv.DictReader(file)
            for name, value in row.items()
            if value and not any(word in name for word in SPEEDS)
        }


def _samples(root: Path) -> Counter[str]:
    return Counter((root / "samples.jsonl").read_text().splitlines())


def _summary(root: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((root / "summary.json").read_text())
    return {name: value for name, value in content.items() if not any(word in name for word in SPEEDS)}


@dataclass(frozen=True)
class Whole:
    """A run that nobody killed: its folder, its operations, and how long it took."""

    root: Path
    targets: list[str]
    seconds: float


def unbroken(kind: Kind, shared: Path, root: Path, steps: int) -> Whole:
    """Run one kind to its end."""
    began = time.monotonic()
    if run(kind.command(shared, root, steps), root) != 0:
        raise SystemExit(
            f"a run failed; see {root.with_suffix('.log')}\n{root.with_suffix('.log').read_text()[-2000:]}"
        )
    return Whole(root, operations(root), time.monotonic() - began)


def prepare() -> None:
    """What is done once, before the forks."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    for name in ("matplotlib.backends.backend_agg", "peft", "moa_lightning.commands.fit.cli"):
        importlib.import_module(name)
    torch.set_num_threads(1)  # a fork has no other threads


def main(arguments: Sequence[str] | None = None) -> None:
    """Kill, resume, compare, print."""
    parser = argparse.ArgumentParser(prog="python -m bench.kills.files", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0, help="of the places and moments")
    parser.add_argument("--steps", type=int, default=5, help="of each run")
    parser.add_argument("--only", default="", help="kinds of runs whose name holds this text")
    parser.add_argument("--keep", type=Path, help="leave runs and logs there")
    options = parser.parse_args(arguments)
    prepare()

    with tempfile.TemporaryDirectory() as scratch:
        shared: Path = (options.keep or Path(scratch)).resolve()
        shared.mkdir(parents=True, exist_ok=True)
        if fork(lambda: make(shared), shared / "make.log") != 0:
            raise SystemExit((shared / "make.log").read_text()[-2000:])
        kinds, draw = [kind for kind in KINDS if options.only in str(kind)], random.Random(options.seed)
        wholes: dict[Kind, Whole] = {}
        aims, alike = (*TARGETS, MOMENT), 0
        print(f"{'kill':>4}  {'run':<28}{'aimed at':<15}{'when':<8}ends alike", flush=True)
        for number in range(options.kills):
            kind, aim = kinds[number % len(kinds)], aims[number % len(aims)]
            if kind not in wholes:
                wholes[kind] = unbroken(kind, shared, shared / f"whole-{len(wholes)}", options.steps)
            if aim == "best.ckpt" and aim not in wholes[kind].targets:  # runs without thresholds keep none
                aim = "last.ckpt"
            whole, root = wholes[kind], shared / f"kill-{number + 1}"
            command, when = kind.command(shared, root, options.steps), draw.choice(WHEN)
            if aim == MOMENT:
                seconds, when = draw.uniform(0, whole.seconds), ""
                code = run(command, root, seconds=seconds)
            else:
                place = draw.choice([i for i, target in enumerate(whole.targets) if target == aim])
                code = run(command, root, Death(place, when, draw.random()))
                if code != -signal.SIGKILL:
                    raise SystemExit(f"the run in {root} was not killed where it should be; it ended with {code}")
            code = run(command, root)
            found = differences(root, whole.root) if code == 0 else [f"exit code {code}, see {root}.log"]
            alike += not found
            print(f"{number + 1:4}  {kind!s:<28}{aim:<15}{when:<8}{'yes' if not found else 'NO'}", flush=True)
            for line in found:
                print(f"      {line}", flush=True)
        print(f"{alike} of {options.kills} ended as the run that nobody killed")
        if alike < options.kills:
            raise SystemExit(1)


if __name__ == "__main__":
    main()
