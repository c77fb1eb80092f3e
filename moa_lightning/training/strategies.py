"""Strategies for Lightning's Trainer: FSDP2 over all processes, or over groups of them (HSDP)."""

from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy, StrategyRegistry
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from moa_lightning.distributed import all_objects, raise_on_all_ranks
from moa_lightning.distributed.shards import load_optimizer_shards, load_shards, reshard, save_shards, stored_shapes
from moa_lightning.errors import UserError
from moa_lightning.models.config import PolicyConfig
from moa_lightning.models.loading import load_model, load_skeleton
from moa_lightning.models.policy import Policy
from moa_lightning.models.reference import Reference
from moa_lightning.models.sharding import (
    ForwardContext,
    Generation,
    Mesh,
    Precision,
    ShardingPlan,
    allocate_parameters,
    replicated,
)
from moa_lightning.models.skeleton import Skeleton, UnsuitedError
from moa_lightning.rewards import RewardPanel
from moa_lightning.training.checkpoints import (
    META,
    AtomicCheckpointIO,
    Replacement,
    bytes_of,
    explained,
    require_finite,
    require_valid,
    save_file,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class FSDP2Strategy(ModelParallelStrategy):
    """Shards parameters, gradients and optimiser state over the processes with PyTorch's ``fully_shard``.

    Args:
        replicas: copies of the sharded model. 1 shards over all processes. The number of nodes all-gathers parameters
            within each node only (HSDP). It must divide the number of processes.
        generation: how the policy samples. ``gathered`` all-gathers it once for each batch of prompts, which takes the
            memory of the full model. ``layerwise`` all-gathers one block at a time, for each token.
            Two processes on a CPU took 1.1 and 2.0 times as long as with an unsharded copy each
            (``bench.sharding.generation``).
        param_dtype: of the computation: ``bfloat16`` is mixed precision; ``None`` is that of the parameters.
        reduce_dtype: of the gradients while they are reduced.
        cpu_offload: keep the shards and the optimiser state in CPU memory.
        reshard_after_forward: free a block's gathered parameters between its forward and its backward pass.
        save_distributed_checkpoint: write a folder with the shards of each process instead of a single file.
        process_group_backend: ``nccl`` or ``gloo``; ``None`` depends on the device.
        timeout_seconds: for collectives, after which a process that waits for the others fails.
    """

    def __init__(
        self,
        replicas: int = 1,
        generation: Generation = "gathered",
        param_dtype: Precision | None = None,
        reduce_dtype: Precision | None = "float32",
        cpu_offload: bool = False,
        reshard_after_forward: bool = True,
        save_distributed_checkpoint: bool = False,
        process_group_backend: str | None = None,
        timeout_seconds: int = 1800,
    ) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timedelta(seconds=timeout_seconds),
        )
        if replicas < 1:
            raise UserError(f"FSDP2Strategy.replicas must be at least 1, got {replicas}")
        self.replicas = replicas
        self.plan = ShardingPlan(generation, param_dtype, reduce_dtype, cpu_offload, reshard_after_forward)
        self.mesh: Mesh

    def setup_environment(self) -> None:
        """Start the process group and build the mesh: all processes, or replicas times shards."""
        processes = self.num_nodes * self.num_processes
        if processes % self.replicas:
            raise UserError(
                f"FSDP2Strategy.replicas {self.replicas} does not divide the {processes} processes of the run"
            )
        self._data_parallel_size = processes
        if self._checkpoint_io is None:  # the Trainer has no checkpoint plugin
            self.checkpoint_io = AtomicCheckpointIO()
        if self.plan.cpu_offload and self.root_device.type == "cpu":
            raise UserError("FSDP2Strategy.cpu_offload is for GPUs: on a CPU the shards are in CPU memory already")
        if self.plan.cpu_offload and self._process_group_backend is None:
            self._process_group_backend = "cpu:gloo,cuda:nccl"  # the gradient norm reduces over CPU tensors
        super().setup_environment()
        self.mesh = self.device_mesh["data_parallel"]
        if self.replicas > 1:
            self.mesh = replicated(self.root_device.type, self.replicas, processes)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Atomically write one file, or a folder with the shards of all processes.

        Raises:
            UserError: on every process, one line with why it could not be written.
        """
        where = self.broadcast(filepath)
        if not self._save_distributed_checkpoint:
            # Lightning's parent class would remove an existing folder before it writes.
            with raise_on_all_ranks():
                self._on_rank_zero(partial(self.checkpoint_io.save_checkpoint, checkpoint, where, storage_options))
            return
        target = Path(where)
        content = {"state_dict": checkpoint.pop("state_dict")}
        content |= {f"optimizer_{i}": state for i, state in enumerate(checkpoint.pop("optimizer_states", []))}
        replacement = Replacement(target)
        try:
            for write in (
                partial(self._on_rank_zero, partial(replacement.prepare, folder=True)),
                partial(save_shards, content, replacement.path),
                partial(self._on_rank_zero, partial(save_file, checkpoint, replacement.path / META)),
                partial(self._on_rank_zero, replacement.commit),
            ):
                with raise_on_all_ranks(), explained(target, bytes_of(content)):
                    write()
        finally:
            self._on_rank_zero(replacement.clear)

    def _on_rank_zero(self, action: Callable[[], object]) -> None:
        if self.is_global_zero:
            action()

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Load a checkpoint after comparing names and shapes of its weights: loading alone ignores missing weights.

        Raises:
            UserError: on every process, if it is not valid or of another model.
        """
        path = Path(self.broadcast(checkpoint_path))
        with raise_on_all_ranks():
            if self.is_global_zero:
                require_valid(path)
        module: Any = self.lightning_module
        if path.is_dir():
            return self._load_sharded(path)
        module.check_weights(torch.load(path, mmap=True, map_location="meta", weights_only=True)["state_dict"])
        return super().load_checkpoint(path, weights_only)

    def _load_sharded(self, path: Path) -> dict[str, Any]:
        """Load a sharded checkpoint. Lightning would expect frozen weights too, which no checkpoint holds."""
        module: Any = self.lightning_module
        saved = stored_shapes(path, "state_dict")
        module.check_weights(saved)
        load_shards(path, module, "state_dict", saved)
        with raise_on_all_ranks():
            require_finite(dict(module.named_parameters()), path)
        for i, optimizer in enumerate(self.optimizers):
            load_optimizer_shards(path, module, optimizer, f"optimizer_{i}")
        rest: dict[str, Any] = torch.load(path / META, map_location="cpu", weights_only=True)
        return rest

    def shard_policy(self, policy: Policy) -> None:
        """Shard a policy over the mesh and allocate memory for its shards. In place."""
        self.plan.apply(policy, self.mesh)
        allocate_parameters(policy, torch.device("cpu") if self.plan.cpu_offload else self.root_device)

    def shard_frozen(self, model: nn.Module) -> ForwardContext:
        """Shard a model that is not trained; see :meth:`ShardingPlan.apply_frozen`."""
        return self.plan.apply_frozen(model, self.mesh)


def load(config: PolicyConfig, strategy: Strategy) -> "tuple[PreTrainedModel, Skeleton | None]":
    """Load the policy's model; on the meta device if the strategy shards it and its files allow that.

    Returns:
        The model, and the skeleton that reads its weights once it is sharded; ``None`` if it has its weights.

    Raises:
        UserError: the model does not load. Under sharding it is raised on every process.
    """
    if not isinstance(strategy, FSDP2Strategy):
        return load_model(config), None
    loaded, reason = None, None
    with raise_on_all_ranks():
        try:
            loaded = load_skeleton(config)
        except UnsuitedError as error:
            reason = str(error)
    # Files may differ between nodes, but all processes must take the same branch.
    if (first := next(filter(None, all_objects(reason)), None)) is None:
        assert loaded is not None
        return loaded
    rank_zero_warn(f"each process loads all of '{config.path}' into CPU memory before it is sharded: {first}")
    with raise_on_all_ranks():
        return load_model(config), None


def place(
    policy: Policy, reference: Reference, panel: RewardPanel, strategy: Strategy, meta_model: Skeleton | None
) -> None:
    """Move or shard a freshly loaded policy, and set up its reference and the rewards' models.

    Raises:
        UserError: the policy computes its logits in an unknown way.
    """
    if not isinstance(strategy, FSDP2Strategy):
        policy.to(strategy.root_device).check_logits()
        reference.setup(policy)
        return
    reference.setup(policy)
    strategy.shard_policy(policy)
    with raise_on_all_ranks():  # a file may be missing on one node
        if meta_model is not None:
            meta_model.fill("policy")
    policy.check_logits()
    reshard(policy)
    reference.shard(policy, strategy.shard_policy)
    panel.shard(strategy.shard_frozen)


StrategyRegistry.register("fsdp2", FSDP2Strategy, description="PyTorch's fully_shard over all processes")
