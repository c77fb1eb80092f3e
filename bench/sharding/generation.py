"""The time of sampling a batch of responses under sharding, beside a whole copy of the policy on each process.

    python -m bench.sharding.generation [--repeats 5] [--sequences 16] [--prompt 16] [--tokens 48]
        [--layers 6] [--hidden 256]

Two processes on the CPU (gloo), each with its own prompts, sample from one policy of GPT-2's shape with random weights:

* ``replica``: each process holds the whole policy, as with DDP;
* ``gathered``: FSDP2, put together once for the batch;
* ``layerwise``: FSDP2, each block put together for each token; a process that is done goes on for the other.

The three take turns, so that a slow moment of the machine hits all of them. A time is that of the slower process.
``ratio`` is the median over the repeats of the time relative to the replica's in the same repeat, with the lowest and
the highest. ``gathered`` bytes are counted, not timed: what one process receives for its whole batch, and for each
token it samples. The samples must be the same to the bit in all three, and the run fails if they are not.

The interconnect decides here: these processes share memory, and GPUs wait less for parameters and less for Python.
What holds everywhere is the number of bytes.
"""

import argparse
import socket
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GenerationConfig

from bench.combiners.combine import Size, build_policy
from moa_lightning.models import Policy
from moa_lightning.models.sharding import ShardingPlan

MODES = ("replica", "gathered", "layerwise")


@dataclass(frozen=True)
class Case:
    """What is sampled."""

    sequences: int = 16  # on each process
    prompt: int = 16
    tokens: int = 48
    layers: int = 6
    hidden: int = 256
    vocabulary: int = 8192
    repeats: int = 5


class Gathered(TorchDispatchMode):
    """Counts the bytes that all-gathers give to this process."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The operation's result."""
        if function is torch.ops.c10d._allgather_base_.default:
            self.bytes += args[0].untyped_storage().nbytes()
        return function(*args, **(kwargs or {}))


def policies(case: Case) -> dict[str, Policy]:
    """The same policy, held in three ways."""
    sizes = {"n_embd": case.hidden, "n_layer": case.layers, "n_head": case.hidden // 32, "vocab_size": case.vocabulary}
    mesh, found = init_device_mesh("cpu", (dist.get_world_size(),)), {}
    for mode in MODES:
        found[mode] = build_policy(Size(mode, sizes, 0)).eval()
        if mode != "replica":
            ShardingPlan(generation=mode).apply(found[mode], mesh)
    return found


def sample(policy: Policy, case: Case, repeat: int) -> Tensor:
    """Responses of this process, which depend on the repeat and the process alone."""
    torch.manual_seed(1000 * repeat + dist.get_rank())
    ids_BP = torch.randint(1, case.vocabulary, (case.sequences, case.prompt))
    config = GenerationConfig(
        do_sample=True, max_new_tokens=case.tokens, top_k=0, eos_token_id=policy.end_ids, pad_token_id=0
    )
    return policy.generate(ids_BP, torch.ones_like(ids_BP), config)


def compare(case: Case) -> dict[str, dict[str, Any]]:
    """Seconds of each repeat, bytes of one, by mode. Every process calls it.

    Raises:
        AssertionError: the samples differ.
    """
    held = policies(case)
    found: dict[str, dict[str, Any]] = {mode: {"seconds": []} for mode in MODES}
    for repeat in range(1 + case.repeats):  # the first does not count
        samples = {}
        for mode, policy in held.items():
            dist.barrier()
            began = time.perf_counter()
            samples[mode] = sample(policy, case, repeat)
            dist.barrier()
            if repeat:
                found[mode]["seconds"].append(time.perf_counter() - began)
        for mode in MODES[1:]:
            assert torch.equal(samples[mode], samples["replica"]), f"{mode} samples other responses"
    for mode, policy in held.items():
        with Gathered() as gathered:
            ids_BL = sample(policy, case, 1)
        found[mode] |= {"bytes": gathered.bytes, "tokens": ids_BL[:, case.prompt :].numel()}
    whole = sum(parameter.numel() * parameter.element_size() for parameter in held["replica"].parameters())
    return found | {"policy": {"bytes": whole}}


def on_two_processes(case: Case) -> dict[str, dict[str, Any]]:
    """What the first one finds."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.pt"
        mp.spawn(_one, args=(port, case, file), nprocs=2)
        found: dict[str, dict[str, Any]] = torch.load(file)
    return found


def _one(number: int, port: int, case: Case, file: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=number, world_size=2)
    found = compare(case)
    if number == 0:
        torch.save(found, file)
    dist.barrier()
    dist.destroy_process_group()


def report(found: dict[str, dict[str, Any]]) -> list[str]:
    """The table."""
    base = found["replica"]["seconds"]
    lines = [f"{'':12}{'seconds':>9}{'ratio':>8}{'from':>7}{'to':>7}{'gathered, MB':>15}{'for each token, kB':>21}"]
    for mode in MODES:
        own = found[mode]
        ratios = [mine / its for mine, its in zip(own["seconds"], base, strict=True)]
        times = f"{median(own['seconds']):9.2f}{median(ratios):8.2f}{min(ratios):7.2f}{max(ratios):7.2f}"
        lines.append(f"{mode:12}{times}{own['bytes'] / 1e6:15.1f}{own['bytes'] / own['tokens'] / 1e3:21.1f}")
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    """Sample, compare, print."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.sharding.generation", description=(__doc__ or "").split("\n")[0]
    )
    for name, default in asdict(Case()).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    case = Case(**vars(parser.parse_args(arguments)))
    found = on_two_processes(case)
    print(
        f"{case.sequences} sequences on each of two processes, prompts of {case.prompt} tokens and {case.tokens} new "
        f"ones,\na policy of {found['policy']['bytes'] / 1e6:.1f} MB (float32). The samples are the same.\n"
    )
    print("\n".join(report(found)))


if __name__ == "__main__":
    main()
