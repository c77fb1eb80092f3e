"""The same count of memory in two real processes: gloo, real tensors, real collectives."""

import socket
import tempfile
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from transformers import PretrainedConfig

from bench.sharding.closed_form import Work
from bench.sharding.measured import Layout, measure


def on_two_processes(config: PretrainedConfig, work: Work) -> dict[str, int]:
    """What the first process counts, by the name of the part."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.pt"
        mp.spawn(_one, args=(port, config, work, file), nprocs=2)
        found: dict[str, int] = torch.load(file)
    return found


def _one(number: int, port: int, config: PretrainedConfig, work: Work, file: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=number, world_size=2)
    found = measure(config, work, Layout(2), fake=False)
    if number == 0:
        torch.save(found, file)
    dist.barrier()
    dist.destroy_process_group()
