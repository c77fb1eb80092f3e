"""A policy in pieces, in one process: what the settings of the sharding plan do."""

import pytest
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import LightningEnvironment
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from moa_lightning.models.sharding import ShardingPlan
from moa_lightning.training.strategies import FSDP2Strategy


class Blocks(nn.Module):
    """What a plan reads of a policy."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])
        self.value_heads = nn.Linear(4, 2)

    def generate(self):
        """Nothing."""

    def check_logits(self):
        """Nothing."""

    def forward(self, values):
        for block in self.blocks:
            values = block(values)
        return self.value_heads(values)


@pytest.fixture
def mesh(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("reshard", [False, True])
def test_sampling_leaves_the_choice_to_reshard_as_it_was(mesh, reshard):
    policy = Blocks()
    ShardingPlan(reshard_after_forward=reshard).apply(policy, mesh)

    def in_pieces_after_a_forward_pass():
        policy(torch.ones(1, 4)).sum()
        found = {isinstance(part.weight, DTensor) for part in (*policy.blocks, policy.value_heads)}
        for part in (*policy.blocks, policy.value_heads, policy):
            part.reshard()
        return found

    assert in_pieces_after_a_forward_pass() == {reshard}
    with policy.generation_context(policy):
        assert not any(isinstance(parameter, DTensor) for parameter in policy.parameters())
    assert in_pieces_after_a_forward_pass() == {reshard}


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"replicas": 0}, "FSDP2Strategy.replicas must be at least 1, got 0"),
        ({"generation": "gatherd"}, "generation of a sharded policy must be gathered or layerwise, got 'gatherd'"),
        ({"param_dtype": "bf16"}, "param_dtype of a sharded policy must be float32 or bfloat16 or float16, got 'bf16'"),
    ],
)
def test_misspelt_names_are_refused(settings, says):
    with pytest.raises(ValueError, match=says):
        FSDP2Strategy(**settings)


def test_offloading_to_where_the_pieces_are_is_refused():
    strategy = FSDP2Strategy(cpu_offload=True)
    strategy.parallel_devices, strategy.cluster_environment = [torch.device("cpu")], LightningEnvironment()
    with pytest.raises(ValueError, match="cpu_offload is for GPUs"):
        strategy.setup_environment()
