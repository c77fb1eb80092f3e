"""Collectives over the processes of a run. In a single process they communicate nothing."""

import atexit
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from moa_lightning.errors import UserError


def is_distributed() -> bool:
    """True when a process group with more than one member runs."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def world_size() -> int:
    """Number of processes, 1 without a process group."""
    return dist.get_world_size() if is_distributed() else 1


def rank() -> int:
    """Index of this process, 0 without a process group."""
    return dist.get_rank() if is_distributed() else 0


def end_process_group() -> None:
    """End the process group and its threads, if there is one. Runs at the exit of Python, after an error too.

    A thread of gloo keeps the tensors of its last collective a moment longer than the caller waits. If it releases them
    while Python shuts down, it asks for Python's lock, which ends a thread by force at that time, and C++ aborts the
    process: "terminate called without an active exception". So the threads have to end before. They end with the last
    reference to the group, of which ``destroy_process_group`` drops only its own; what a script keeps in global
    variables, such as a Trainer, stays.
    """
    if not dist.is_available() or not dist.is_initialized():
        return
    for name in ("last_type", "last_value", "last_traceback"):  # an error that nobody caught holds what it ran on
        vars(sys).pop(name, None)
    gc.collect()
    dist.destroy_process_group()
    # DTensor's caches keep every mesh, and LightningCLI's parsers a trainer with its sharded model; read in torch 2.13.
    for found in gc.get_objects():
        if type(found) is DeviceMesh:
            getattr(found, "_pg_registry", {}).clear()
        elif type(found).__name__.endswith("DPMeshInfo"):  # FSDP, HSDP and DDP
            for name in ("shard_process_group", "replicate_process_group"):
                vars(found).pop(name, None)


atexit.register(end_process_group)


def all_sum(tensor: Tensor) -> Tensor:
    """Sum over the processes, out of place, without gradient. Any shape."""
    if not is_distributed():
        return tensor.detach()
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total


def any_rank(flag: bool, device: torch.device) -> bool:
    """True on every process if the flag is set on at least one."""
    return bool(all_sum(torch.tensor(float(flag), device=device)) > 0)


def all_min(number: int, device: torch.device) -> int:
    """The smallest of the processes' numbers."""
    least = torch.tensor(number, device=device)
    if is_distributed():
        dist.all_reduce(least, dist.ReduceOp.MIN)
    return int(least)


def all_max(number: int, device: torch.device) -> int:
    """The largest of the processes' numbers."""
    largest = torch.tensor(number, device=device)
    if is_distributed():
        dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def all_rows(rows: Tensor) -> Tensor:
    """The rows of all processes, in the order of their ranks; processes may have different numbers of them."""
    if not is_distributed():
        return rows.detach()
    counts = all_sum(torch.nn.functional.one_hot(torch.tensor(rank()), world_size()).to(rows.device) * len(rows))
    padded = rows.new_zeros((int(counts.max()), *rows.shape[1:]))
    padded[: len(rows)] = rows.detach()
    parts = [torch.empty_like(padded) for _ in range(world_size())]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(count)] for part, count in zip(parts, counts, strict=True)])


def all_objects(mine: Any) -> list[Any]:
    """The objects of all processes, in the order of their ranks. They must be picklable."""
    if not is_distributed():
        return [mine]
    objects: list[Any] = [None] * world_size()
    dist.all_gather_object(objects, mine)
    return objects


@contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """Context manager: an error on any rank is raised on every rank, so that none hangs in a collective.

    Raises:
        UserError: on every rank, with the message of the first one that failed.
    """
    failed: Exception | None = None
    try:
        yield
    except Exception as error:  # noqa: BLE001 (it is raised below, when the others know of it)
        failed = error
    message = None if failed is None else str(failed) or type(failed).__name__
    first = next(filter(None, all_objects(message)), None)
    if failed is not None and not isinstance(failed, UserError | OSError):
        raise failed  # a bug: keep its traceback
    if first is not None:
        raise UserError(first) from failed
