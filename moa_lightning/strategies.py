"""Strategies for Lightning's Trainer: FSDP2 over all processes, or over groups of them (HSDP)."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy, StrategyRegistry

from moa_lightning.models.policy import Policy
from moa_lightning.models.reference import Reference
from moa_lightning.models.sharding import Generation, Mesh, Precision, ShardingPlan, replicated


class FSDP2Strategy(ModelParallelStrategy):
    """Parameters, gradients and optimiser state in pieces over the processes (PyTorch's ``fully_shard``).

    Args:
        replicas: copies of the sharded model; 1 shards over all processes, the number of nodes keeps the gathering
            of parameters within each node (HSDP). It divides the number of processes.
        generation: how the policy samples. ``gathered`` puts it together once for each batch of prompts, which takes
            the memory of the whole model; ``layerwise`` puts one block together at a time, for each token.
        param_dtype: of the computation: ``bfloat16`` is mixed precision; ``None`` is that of the parameters.
        reduce_dtype: of the gradients while they are summed.
        cpu_offload: keep the pieces in the main memory, and the optimiser there.
        reshard_after_forward: drop a block's gathered parameters between its forward and its backward pass.
        save_distributed_checkpoint: write a folder with each process's pieces, not one file.
        process_group_backend: ``nccl`` or ``gloo``; ``None`` goes by the device.
        timeout_seconds: after which a process that hears nothing from the others gives up.
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
            raise ValueError(f"FSDP2Strategy.replicas must be at least 1, got {replicas}")
        self.replicas = replicas
        self.plan = ShardingPlan(generation, param_dtype, reduce_dtype, cpu_offload, reshard_after_forward)
        self.mesh: Mesh

    def setup_environment(self) -> None:
        """Start the process group; one mesh over all processes, or replicas times pieces."""
        processes = self.num_nodes * self.num_processes
        if processes % self.replicas:
            raise ValueError(
                f"FSDP2Strategy.replicas {self.replicas} does not divide the {processes} processes of the run"
            )
        self._data_parallel_size = processes
        super().setup_environment()
        self.mesh = self.device_mesh["data_parallel"]
        if self.replicas > 1:
            self.mesh = replicated(self.root_device.type, self.replicas, processes)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Compare the names of the weights first: loading itself does not mind what is missing."""
        path = Path(self.broadcast(checkpoint_path))
        module: Any = self.lightning_module
        if path.is_file():
            module.check_weights(torch.load(path, mmap=True, map_location="meta", weights_only=True)["state_dict"])
        return super().load_checkpoint(checkpoint_path, weights_only)

    def cut(self, policy: Policy) -> None:
        """Shard a policy over the mesh, in place."""
        self.plan.apply(policy, self.mesh)


def shard(policy: Policy, reference: Reference, strategy: Strategy) -> None:
    """Cut policy and reference into pieces, if the strategy is one that does."""
    if isinstance(strategy, FSDP2Strategy):
        strategy.cut(policy)
        reference.shard(policy, strategy.cut)


StrategyRegistry.register("fsdp2", FSDP2Strategy, description="PyTorch's fully_shard over all processes")
