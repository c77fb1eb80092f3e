"""Collectives over the processes of a run. Everything is a no-op in one process."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

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
    """The least of the processes' numbers."""
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
    """One object of each process, in the order of their ranks."""
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
    said = None if failed is None else str(failed) or type(failed).__name__
    first = next(filter(None, all_objects(said)), None)
    if failed is not None and not isinstance(failed, UserError | OSError):
        raise failed  # a defect: its traceback is wanted
    if first is not None:
        raise UserError(first) from failed
