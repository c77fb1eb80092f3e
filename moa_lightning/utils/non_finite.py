"""Finding NaN and infinities in tensors, and the error that keeps them out of files."""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from moa_lightning.distributed.shards import local_shard
from moa_lightning.errors import UserError


class NonFiniteError(UserError):
    """A loss, a gradient, a weight or a logit is NaN or infinite. Files on disk are from before."""


def norm_here(tensors: Iterable[Tensor]) -> Tensor:
    """Joint 2-norm of tensors, or of this process's shards of them, in one fused pass.

    The norm of finite tensors overflows above 1.8e19 in float32 and bfloat16. So does an optimiser that squares such
    gradients, so this counts as not finite. Float16 overflows at 65,504: with float16 tensors it is the maximum norm.
    """
    parts = [local_shard(tensor).detach() for tensor in tensors]
    order = math.inf if any(part.dtype == torch.float16 for part in parts) else 2.0
    return torch.nn.utils.get_total_norm([part for part in parts if part.numel()], norm_type=order)


def names_of_non_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that hold NaN or infinities; of sharded tensors, in this process's shard."""
    floating = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    if not floating or bool(
        torch.isfinite(norm_here(floating.values()))
    ):  # one synchronisation with the device for all
        return []
    return [name for name, tensor in floating.items() if not bool(torch.isfinite(local_shard(tensor)).all())]


def some(names: list[str]) -> str:
    """The first name, and the number of further names.

    >>> some(["a", "b", "c"])
    'a and 2 more'
    """
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
