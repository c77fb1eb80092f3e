"""The only place (with the sharding plan) that talks to torch.distributed. Everything is a no-op in one process."""

import torch
import torch.distributed as dist
from torch import Tensor


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
