"""Sharding policies, and other models that only answer, over processes with FSDP2, block by block."""

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
KeepTogether = Callable[[nn.Module], AbstractContextManager[bool]]
Mesh = DeviceMesh
"""Processes in one row, or in rows of replicas."""


@dataclass(frozen=True)
class ShardingPlan:
    """How a policy is cut up.

    Args:
        generation: how the policy samples. ``gathered`` puts it together once for each batch of prompts, which takes
            the memory of the whole model; ``layerwise`` puts one block together at a time, for each token.
        param_dtype: of the gathered parameters, and so of the computation; ``None`` is their own.
        reduce_dtype: of the gradients while they are summed; ``None`` is that of the computation.
        cpu_offload: keep the pieces in the main memory, and the optimiser there.
        reshard_after_forward: drop a block's gathered parameters between its forward and its backward pass.
    """

    generation: Generation = "gathered"
    param_dtype: Precision | None = None
    reduce_dtype: Precision | None = "float32"
    cpu_offload: bool = False
    reshard_after_forward: bool = True

    def __post_init__(self) -> None:
        """Refuse names without meaning."""
        for setting, value, known in (
            ("generation", self.generation, get_args(Generation)),
            ("param_dtype", self.param_dtype or "float32", get_args(Precision)),
            ("reduce_dtype", self.reduce_dtype or "float32", get_args(Precision)),
        ):
            if value not in known:
                raise UserError(f"{setting} of a sharded policy must be {' or '.join(known)}, got '{value}'")

    def apply(self, policy: Policy, mesh: Mesh) -> None:
        """Shard every block, the value heads (in their own precision), and then what is left. In place."""
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
        # The root is the policy, not the model in it: its forward pass uses the parts of the model one by one.
        fully_shard(policy, mesh=mesh, mp_policy=mixed, offload_policy=offload)
        register_fsdp_forward_method(policy, "generate")
        register_fsdp_forward_method(policy, "check_logits")
        # The hidden states are a view of the decoder's; nothing here changes them in place.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        policy.keep_together = self._keeping_together()

    def apply_frozen(self, model: nn.Module, mesh: Mesh) -> KeepTogether:
        """Shard a model that only answers, such as a reward's: each block, then what is left. In place.

        Returns:
            What must surround its forward passes: within it the model is whole, or (``layerwise``) processes must run
            the same number of forward passes, which is what it yields.
        """
        offload = CPUOffloadPolicy() if self.cpu_offload else OffloadPolicy()
        for part in (*_blocks(model), model):  # in the model's own precision: scores do not depend on the Trainer's
            # Without a backward pass the root would never let go of what it gathered, unless it is told to.
            fully_shard(part, mesh=mesh, offload_policy=offload, reshard_after_forward=True)
        return self._keeping_together()

    def _keeping_together(self) -> KeepTogether:
        if self.generation == "layerwise":
            return _layer_by_layer
        return partial(_gathered, reshards=self.reshard_after_forward)


def give_memory(model: nn.Module, device: torch.device) -> None:
    """Memory for the pieces of parameters without any (meta), uninitialised; weights that were tied stay so."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                if id(parameter) not in made:
                    empty = torch.empty_like(parameter, device=device)
                    made[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
                module._parameters[name] = made[id(parameter)]
    model._apply(lambda tensor: tensor)  # tells the sharding that its parameters are others


@torch.no_grad()
def copy_shards(source: nn.Module, target: nn.Module) -> None:
    """Copy the parameters of a model to its twin; both have been cut alike."""
    for old, new in zip(source.parameters(), target.parameters(), strict=True):
        new.copy_(old)


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The items of a model's lists of modules, but of no list within another one's items."""
    found: list[nn.Module] = []
    for child in model.children():
        found += list(child) if isinstance(child, nn.ModuleList) else _blocks(child)
    return found


def replicated(device_type: str, replicas: int, processes: int) -> Mesh:
    """So many copies of the model, each over an equal part of the processes."""
    return init_device_mesh(device_type, (replicas, processes // replicas), mesh_dim_names=("replicas", "pieces"))


@contextmanager
def _gathered(policy: nn.Module, reshards: bool) -> Iterator[bool]:
    """Within it all parameters are whole; processes may run forward passes on their own. ``reshards``: afterwards."""
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
def _layer_by_layer(policy: nn.Module) -> Iterator[bool]:
    """Within it processes must run the same number of forward passes: those that are done go on for the others."""
    yield True


def _dtype(name: Precision | None) -> torch.dtype | None:
    return None if name is None else getattr(torch, name)
