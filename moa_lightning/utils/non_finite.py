"""NaN and infinities: what is not finite among tensors, and the error that keeps it out of every file."""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from moa_lightning.distributed.shards import local_shard
from moa_lightning.errors import UserError


class NonFiniteError(UserError):
    """A loss, a gradient, a weight or a logit is NaN or infinite; what is on the disk is from before."""


def norm_here(tensors: Iterable[Tensor]) -> Tensor:
    """2-norm of all of them together; of sharded ones, of the shards of this process. One fused pass.

    The norm of finite tensors overflows above 1.8e19 in float32 and bfloat16. An optimiser that squares such gradients
    does too, so that counts as not finite. Float16 reaches its limit at 65,504: there it is the largest entry.
    """
    parts = [local_shard(tensor).detach() for tensor in tensors]
    order = math.inf if any(part.dtype == torch.float16 for part in parts) else 2.0
    return torch.nn.utils.get_total_norm([part for part in parts if part.numel()], norm_type=order)


def names_of_non_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors, or shards of this process, that hold NaN or infinities."""
    floating = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    if not floating or bool(torch.isfinite(norm_here(floating.values()))):  # one look at the device for all of them
        return []
    return [name for name, tensor in floating.items() if not bool(torch.isfinite(local_shard(tensor)).all())]


def some(names: list[str]) -> str:
    """The first name, and how many more there are.

    >>> some(["a", "b", "c"])
    'a and 2 more'
    """
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
