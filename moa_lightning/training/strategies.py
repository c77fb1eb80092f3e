"""Strategies for Lightning's Trainer: FSDP2 over all processes, or over groups of them (HSDP)."""

from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy, StrategyRegistry
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from transformers import PreTrainedModel

from moa_lightning.distributed import all_objects, raise_on_all_ranks
from moa_lightning.distributed.shards import load_optimizer_shards, load_shards, reshard, save_shards, stored_shapes
from moa_lightning.errors import UserError
from moa_lightning.models.config import PolicyConfig
from moa_lightning.models.loading import load_model, load_skeleton
from moa_lightning.models.policy import Policy
from moa_lightning.models.reference import Reference
from moa_lightning.models.sharding import (
    Generation,
    KeepTogether,
    Mesh,
    Precision,
    ShardingPlan,
    give_memory,
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


class FSDP2Strategy(ModelParallelStrategy):
    """Parameters, gradients and optimiser state in pieces over the processes (PyTorch's ``fully_shard``).

    Args:
        replicas: copies of the sharded model; 1 shards over all processes, the number of nodes keeps the gathering
            of parameters within each node (HSDP). It divides the number of processes.
        generation: how the policy samples. ``gathered`` puts it together once for each batch of prompts, which takes
            the memory of the whole model; ``layerwise`` puts one block together at a time, for each token.
            Two processes on a CPU took 1.1 and 2.0 times as long as with a whole copy each
            (``bench.sharding.generation``).
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
            raise UserError(f"FSDP2Strategy.replicas must be at least 1, got {replicas}")
        self.replicas = replicas
        self.plan = ShardingPlan(generation, param_dtype, reduce_dtype, cpu_offload, reshard_after_forward)
        self.mesh: Mesh

    def setup_environment(self) -> None:
        """Start the process group; one mesh over all processes, or replicas times pieces."""
        processes = self.num_nodes * self.num_processes
        if processes % self.replicas:
            raise UserError(
                f"FSDP2Strategy.replicas {self.replicas} does not divide the {processes} processes of the run"
            )
        self._data_parallel_size = processes
        if self._checkpoint_io is None:  # the Trainer was given none
            self.checkpoint_io = AtomicCheckpointIO()
        if self.plan.cpu_offload and self.root_device.type == "cpu":
            raise UserError("FSDP2Strategy.cpu_offload is for GPUs: on a CPU the pieces are in main memory already")
        if self.plan.cpu_offload and self._process_group_backend is None:
            self._process_group_backend = "cpu:gloo,cuda:nccl"  # gradients in main memory are summed for their norm
        super().setup_environment()
        self.mesh = self.device_mesh["data_parallel"]
        if self.replicas > 1:
            self.mesh = replicated(self.root_device.type, self.replicas, processes)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Write one file, or a folder with the pieces of all processes; whole or not at all.

        Raises:
            UserError: on every process, one line with why it could not be written.
        """
        where = self.broadcast(filepath)
        if not self._save_distributed_checkpoint:
            with (
                raise_on_all_ranks()
            ):  # not by Lightning's parent class: it removes a folder that is there before it writes
                self._first_alone(partial(self.checkpoint_io.save_checkpoint, checkpoint, where, storage_options))
            return
        target = Path(where)
        content = {"state_dict": checkpoint.pop("state_dict")}
        content |= {f"optimizer_{i}": state for i, state in enumerate(checkpoint.pop("optimizer_states", []))}
        replacement = Replacement(target)
        try:
            for write in (
                partial(self._first_alone, partial(replacement.prepare, folder=True)),
                partial(save_shards, content, replacement.path),
                partial(self._first_alone, partial(save_file, checkpoint, replacement.path / META)),
                partial(self._first_alone, replacement.commit),
            ):
                with raise_on_all_ranks(), explained(target, bytes_of(content)):
                    write()
        finally:
            self._first_alone(replacement.clear)

    def _first_alone(self, action: Callable[[], object]) -> None:
        if self.is_global_zero:
            action()

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Compare names and shapes of the weights first: loading itself does not mind what is missing.

        Raises:
            UserError: on every process: it is not whole, or of another model.
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
        """Lightning would look for frozen weights too, which are in no checkpoint."""
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

    def cut(self, policy: Policy) -> None:
        """Shard a policy over the mesh, in place, and give its pieces memory."""
        self.plan.apply(policy, self.mesh)
        give_memory(policy, torch.device("cpu") if self.plan.cpu_offload else self.root_device)

    def cut_frozen(self, model: nn.Module) -> KeepTogether:
        """Shard a model that only answers; see :meth:`ShardingPlan.apply_frozen`."""
        return self.plan.apply_frozen(model, self.mesh)


def load(config: PolicyConfig, strategy: Strategy) -> tuple[PreTrainedModel, Skeleton | None]:
    """The policy's model; without its weights, if the strategy cuts it into pieces and their files allow that.

    Raises:
        UserError: it does not open; under sharding on every process.
    """
    if not isinstance(strategy, FSDP2Strategy):
        return load_model(config), None
    bare, reason = None, None
    with raise_on_all_ranks():
        try:
            bare = load_skeleton(config)
        except UnsuitedError as error:
            reason = str(error)
    # Files may differ between nodes, and all processes must go the same way from here.
    if (first := next(filter(None, all_objects(reason)), None)) is None:
        assert bare is not None
        return bare
    rank_zero_warn(f"each process reads '{config.path}' whole into main memory before it is cut into pieces: {first}")
    with raise_on_all_ranks():
        return load_model(config), None


def place(policy: Policy, reference: Reference, panel: RewardPanel, strategy: Strategy, bare: Skeleton | None) -> None:
    """Put a freshly loaded policy, its reference and the rewards' models where they compute: cut into pieces, or whole.

    Raises:
        UserError: the policy's logits are not what they are taken to be.
    """
    if not isinstance(strategy, FSDP2Strategy):
        policy.to(strategy.root_device).check_logits()
        reference.setup(policy)
        return
    reference.setup(policy)
    strategy.cut(policy)
    with raise_on_all_ranks():  # a file may be gone on one node
        if bare is not None:
            bare.fill("policy")
    policy.check_logits()
    reshard(policy)
    reference.shard(policy, strategy.cut)
    panel.shard(strategy.cut_frozen)


StrategyRegistry.register("fsdp2", FSDP2Strategy, description="PyTorch's fully_shard over all processes")
