"""Sharding policies and frozen models over processes with FSDP2, block by block."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from moa_lightning.errors import UserError
from moa_lightning.models.policy import Policy

Precision = Literal["float32", "bfloat16", "float16"]
Generation = Literal["gathered", "layerwise"]
ForwardContext = Callable[[nn.Module], AbstractContextManager[bool]]
"""Gives the context manager for a model's forward passes. It yields whether all processes must run equally many."""
Mesh = DeviceMesh
"""One dimension of shards, or two: replicas and shards."""


@dataclass(frozen=True)
class ShardingPlan:
    """How a policy is sharded.

    Args:
        generation: how the policy samples. ``gathered`` all-gathers it once for each batch of prompts, which takes the
            memory of the full model. ``layerwise`` all-gathers one block at a time, for each token.
        param_dtype: of the gathered parameters, and so of the computation; ``None`` keeps their own.
        reduce_dtype: of the gradients while they are reduced; ``None`` is that of the computation.
        cpu_offload: keep the shards and the optimiser state in CPU memory.
        reshard_after_forward: free a block's gathered parameters between its forward and its backward pass.
    """

    generation: Generation = "gathered"
    param_dtype: Precision | None = None
    reduce_dtype: Precision | None = "float32"
    cpu_offload: bool = False
    reshard_after_forward: bool = True

    def __post_init__(self) -> None:
        """Validate hyperparameters."""
        for setting, value, known in (
            ("generation", self.generation, get_args(Generation)),
            ("param_dtype", self.param_dtype or "float32", get_args(Precision)),
            ("reduce_dtype", self.reduce_dtype or "float32", get_args(Precision)),
        ):
            if value not in known:
                raise UserError(f"{setting} of a sharded policy must be {' or '.join(known)}, got '{value}'")

    def apply(self, policy: Policy, mesh: Mesh) -> None:
        """Shard every block, the value heads (in their own precision), and then the rest. In place."""
        offload = CPUOffloadPolicy() if self.cpu_offload else OffloadPolicy()
        exact = MixedPrecisionPolicy(reduce_dtype=_dtype(self.reduce_dtype))
        mixed = MixedPrecisionPolicy(param_dtype=_dtype(self.param_dtype), reduce_dtype=_dtype(self.reduce_dtype))
        for block in policy.blocks:
            fully_shard(
                block,
                mesh=mesh,
                mp_policy=mixed,
                offload_policy=offload,
                reshard_after_forward=self.reshard_after_forward,
            )
        if policy.value_heads is not None:
            fully_shard(
                policy.value_heads,
                mesh=mesh,
                mp_policy=exact,
                offload_policy=offload,
                reshard_after_forward=self.reshard_after_forward,
            )
        # The root is the policy, not the model in it: the policy's forward pass calls parts of the model directly.
        fully_shard(policy, mesh=mesh, mp_policy=mixed, offload_policy=offload)
        register_fsdp_forward_method(policy, "generate")
        register_fsdp_forward_method(policy, "check_logits")
        # The hidden states are a view of the decoder's. Nothing here changes them in place.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        policy.generation_context = self._forward_context()

    def apply_frozen(self, model: nn.Module, mesh: Mesh) -> ForwardContext:
        """Shard a model that is not trained, such as a reward model: each block, then the rest. In place.

        Returns:
            The context manager for its forward passes. In it the model is unsharded; under ``layerwise`` it yields True
            instead, and all processes must run the same number of forward passes.
        """
        offload = CPUOffloadPolicy() if self.cpu_offload else OffloadPolicy()
        for part in (*_blocks(model), model):  # in the model's own precision: scores do not depend on the Trainer's
            # By default the root reshards in a backward pass only, and there is none.
            fully_shard(part, mesh=mesh, offload_policy=offload, reshard_after_forward=True)
        return self._forward_context()

    def _forward_context(self) -> ForwardContext:
        if self.generation == "layerwise":
            return _layerwise
        return partial(_gathered, reshards=self.reshard_after_forward)


def allocate_parameters(model: nn.Module, device: torch.device) -> None:
    """Allocate uninitialised memory for parameters or shards on the meta device. Tied weights stay tied. In place."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                if id(parameter) not in made:
                    empty = torch.empty_like(parameter, device=device)
                    made[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
                module._parameters[name] = made[id(parameter)]
    model._apply(lambda tensor: tensor)  # makes FSDP pick up the new parameters


@torch.no_grad()
def copy_shards(source: nn.Module, target: nn.Module) -> None:
    """Copy the parameters of a model to another one of the same architecture and sharding. In place."""
    for old, new in zip(source.parameters(), target.parameters(), strict=True):
        new.copy_(old)


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The items of a model's outermost ``ModuleList`` modules."""
    found: list[nn.Module] = []
    for child in model.children():
        found += list(child) if isinstance(child, nn.ModuleList) else _blocks(child)
    return found


def replicated(device_type: str, replicas: int, processes: int) -> Mesh:
    """Mesh for HSDP: each replica of the model is sharded over an equal part of the processes."""
    return init_device_mesh(device_type, (replicas, processes // replicas), mesh_dim_names=("replicas", "shards"))


@contextmanager
def _gathered(policy: nn.Module, reshards: bool) -> Iterator[bool]:
    """Context manager: unshards all parameters, so that processes run forward passes independently.

    ``reshards`` is the ``reshard_after_forward`` that the blocks get back.
    """
    parts = [module for module in policy.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield False
    finally:
        for part in parts:
            part.set_reshard_after_forward(reshards and part is not policy, recurse=False)
            part.reshard()


@contextmanager
def _layerwise(policy: nn.Module) -> Iterator[bool]:
    """Context manager: yields True, as all processes must run the same number of forward passes."""
    yield True


def _dtype(name: Precision | None) -> torch.dtype | None:
    return None if name is None else getattr(torch, name)
