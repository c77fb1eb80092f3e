"""Kill one or both of two processes of a run; resume it, and compare every file with the run that nobody killed.

    python -m bench.kills.pairs [--kills 12] [--seed 0] [--steps 5] [--only MOPO] [--keep DIR]

Runs of ``bench.kills.files``, drawn by the seed, on two processes under DDP or FSDP2. Of each the first process dies
alone while it writes one of the run's files, the second one dies alone at a moment when the first one writes, and both
die while the first one writes. A process that is left alone has to end by itself: here is no launcher, which ends it
also before the two have met. The same command, with
``--ckpt_path=last`` and two processes, brings the run to its end, which is compared as there.
"""

import argparse
import os
import random
import signal
import socket
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench.fuzz.run import make
from bench.kills.files import KINDS, MOMENT, Kind, Whole, differences, fork, operations, prepare, start
from bench.kills.writes import TARGETS, WHEN, Death, Writes

STRATEGIES = ("ddp", "fsdp2")
VICTIMS = ("the first", "the second", "both")
PATIENCE = 60.0  # seconds in which a process that lost its peer has to end


def on_two(kind: Kind, strategy: str) -> Kind:
    """The same run on two processes, with the batches of one."""

    def settings(folder: Path) -> dict[str, Any]:
        found = kind.settings(folder)
        found["trainer"] |= {"devices": 2, "strategy": strategy}
        found["data"]["init_args"]["batch_size"] //= 2
        return found

    return replace(kind, name=f"{kind.name}, {strategy}", settings=settings)


def run(
    arguments: Sequence[str], root: Path, victims: str = "", death: Death | None = None, reached: int | None = None
) -> list[int]:
    """Exit codes of the two processes of a run, each a fork, negative for a signal; -100 for one that had to be ended.

    Args:
        arguments: of ``moa``.
        root: the run folder; logs and the operations of the first process are beside it.
        victims: one of ``VICTIMS``, or none.
        death: at an operation of the first process.
        reached: operation of the first process at which the second one dies.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def process(rank: int) -> None:
        from moa_lightning.cli import main

        os.environ |= {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "GROUP_RANK": "0",
            "TORCHELASTIC_RUN_ID": str(port),
        }
        torch.set_num_threads(1)
        if rank == 0:
            Writes(root, death, root.with_suffix(".writes")).install()
        main(arguments)

    logs = [root.with_suffix(".log"), root.with_suffix(".second.log")]
    children = [start(lambda rank=rank: process(rank), log) for rank, log in enumerate(logs)]  # type: ignore[misc]
    while reached is not None:  # the first operation comes when they have met
        if root.with_suffix(".writes").exists() and len(operations(root)) > reached:
            os.kill(children[1], signal.SIGKILL)
            break
        if os.waitid(os.P_PID, children[0], os.WEXITED | os.WNOHANG | os.WNOWAIT):
            break
        time.sleep(0.003)
    codes: dict[int, int] = {}
    alone_since = None
    while len(codes) < len(children):
        for child in children:
            if child not in codes and (found := os.waitpid(child, os.WNOHANG)) != (0, 0):
                codes[child] = os.waitstatus_to_exitcode(found[1])
                alone_since = alone_since or time.monotonic()
                if victims == "both" and len(codes) == 1:
                    os.kill(next(other for other in children if other != child), signal.SIGKILL)
        if alone_since is not None and time.monotonic() > alone_since + PATIENCE:
            for child in children:
                if child not in codes:
                    os.kill(child, signal.SIGKILL)
                    os.waitpid(child, 0)
                    codes[child] = -100
        time.sleep(0.02)
    return [codes[child] for child in children]


def unbroken(kind: Kind, shared: Path, root: Path, steps: int) -> Whole:
    """Run one kind to its end."""
    began = time.monotonic()
    if run(kind.command(shared, root, steps), root) != [0, 0]:
        raise SystemExit(f"a run failed\n{root.with_suffix('.log').read_text()[-2000:]}")
    return Whole(root, operations(root), time.monotonic() - began)


def main(arguments: Sequence[str] | None = None) -> None:
    """Kill, resume, compare, print."""
    parser = argparse.ArgumentParser(prog="python -m bench.kills.pairs", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kills", type=int, default=12)
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
        draw, alike = random.Random(options.seed), 0
        kinds = [on_two(kind, STRATEGIES[i % 2]) for i, kind in enumerate(KINDS) if options.only in str(kind)]
        draw.shuffle(kinds)
        wholes: dict[Kind, Whole] = {}
        print(f"{'kill':>4}  {'run':<34}{'dies':<12}{'aimed at':<15}{'when':<8}ends alike", flush=True)
        for number in range(options.kills):
            kind, victims = kinds[number // len(VICTIMS) % len(kinds)], VICTIMS[number % len(VICTIMS)]
            if kind not in wholes:
                wholes[kind] = unbroken(kind, shared, shared / f"whole-{len(wholes)}", options.steps)
            whole, root = wholes[kind], shared / f"kill-{number + 1}"
            command = kind.command(shared, root, options.steps)
            if victims == "the second":
                aim, when = MOMENT, ""
                codes = run(command, root, victims, reached=draw.randrange(len(whole.targets) - 1))
            else:
                aim, when = draw.choice(sorted(set(TARGETS) & set(whole.targets))), draw.choice(WHEN)
                place = draw.choice([i for i, target in enumerate(whole.targets) if target == aim])
                codes = run(command, root, victims, Death(place, when, draw.random()))
            found = [f"a process that was left alone did not end in {PATIENCE:.0f} s"] if -100 in codes else []
            ends = run(command, root)
            found += differences(root, whole.root) if ends == [0, 0] else [f"exit codes {ends}, see {root}.log"]
            alike += not found
            dead = "yes" if not found else "NO"
            print(f"{number + 1:4}  {kind!s:<34}{victims:<12}{aim:<15}{when:<8}{dead}  (codes {codes})", flush=True)
            for line in found:
                print(f"      {line}", flush=True)
        print(f"{alike} of {options.kills} ended as the run that nobody killed")
        if alike < options.kills:
            raise SystemExit(1)


if __name__ == "__main__":
    main()
