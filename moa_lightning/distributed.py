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
