"""Where combiners take the objectives' gradients: each place against one backward pass for each objective."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy

from moa_lightning.combiners import GAPO, MGDAUB, DynamicWeights, Gramian, Linear
from moa_lightning.models import LoRA, Policy, PolicyConfig
from moa_lightning.models.loading import load_model, load_tokenizer
from moa_lightning.signals import ClipRange, GradientPlace
from moa_lightning.sources import Rollout
from moa_lightning.training.compatibility import check_strategy
from moa_lightning.training.strategies import FSDP2Strategy
from moa_lightning.types import Experience, Responses, RewardTable
from tests.helpers import tiny

PLACES = ["representation", "last_layer", "parameters"]


def policy_of(folder, lora=None):
    config = PolicyConfig(str(folder), lora=lora)
    return Policy(load_model(config), load_tokenizer(config)).eval()


def experience():
    """Four rows with three objectives, on which the policy has not moved."""
    ids_BL, attention_BL, mask_BT = tiny.padded_batch()
    generator = torch.Generator().manual_seed(1)
    table_BN, zeros_BT = torch.randn(4, 3, generator=generator), torch.zeros(mask_BT.shape)
    texts = [""] * 4
    return Experience(
        responses=Responses(ids_BL, attention_BL, mask_BT, ~mask_BT.any(1), texts, texts, {}),
        rewards=RewardTable(("a", "b", "c"), (True,) * 3, table_BN, table_BN),
        valid_BN=torch.ones(4, 3, dtype=torch.bool),
        mask_BT=mask_BT,
        behaviour_logprobs_BT=zeros_BT,
        reference_logprobs_BT=zeros_BT,
        advantages_BTN=torch.randn(*mask_BT.shape, 3, generator=generator) * mask_BT.unsqueeze(-1),
        returns_BTN=None,
        values_BTN=None,
        tokens_per_row=3.0,
    )


def gram(policy, rows, place):
    """What the source gives, and the gradients that it is of."""
    responses = rows.responses
    output = policy(responses.input_ids_BL, responses.attention_mask_BL, responses.mask_BT)
    parameters = policy.parameters_at(GradientPlace(place))
    signals = Rollout().signals(rows, output, ClipRange(0.2, 0.2), parameters)
    slopes_BTN = rows.advantages_BTN
    jacobian = [
        torch.cat(
            [
                part.flatten()
                for part in torch.autograd.grad(
                    (output.logprobs_BT * slopes_BTN[..., i]).sum(),
                    parameters or [output.hidden_BTD],
                    retain_graph=True,
                )
            ]
        )
        for i in range(3)
    ]
    found_NN = signals.gramian(slopes_BTN)
    output.logprobs_BT.sum().backward()  # the graph is still there for the loss
    return found_NN.float(), torch.stack(jacobian)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("lora", [None, LoRA(r=2)], ids=["full", "lora"])
def test_gram_matrix_of_one_backward_pass_each(tmp_path, place, lora):
    policy = policy_of(tiny.policy_folder(tmp_path / "policy", scale=1.0), lora)
    if lora:
        with torch.no_grad():  # a fresh adapter's B is 0, and so are the gradients of its A
            for parameter in policy.trainable()[0]:
                parameter.normal_(generator=torch.Generator().manual_seed(0), std=0.1)
    found_NN, jacobian = gram(policy, experience(), place)
    assert found_NN.diagonal().min() > 0
    torch.testing.assert_close(found_NN, jacobian @ jacobian.T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", [tiny.gpt2_config(), tiny.llama_config()], ids=["gpt2", "llama"])
def test_the_last_layer_is_the_last_block_with_something_to_train(tmp_path, config):
    folder = tiny.policy_folder(tmp_path / "policy", config)
    policy = policy_of(folder)
    blocks = next(m for m in policy.causal_lm.get_decoder().children() if isinstance(m, torch.nn.ModuleList))
    assert {id(p) for p in policy.parameters_at(GradientPlace.LAST_LAYER)} == {id(p) for p in blocks[1].parameters()}
    blocks[1].requires_grad_(False)
    assert {id(p) for p in policy.parameters_at(GradientPlace.LAST_LAYER)} == {id(p) for p in blocks[0].parameters()}
    assert policy.parameters_at(GradientPlace.REPRESENTATION) is None
    blocks[0].requires_grad_(False)
    with pytest.raises(ValueError, match="has no last layer with trained parameters that is known here; take"):
        policy.parameters_at(GradientPlace.LAST_LAYER)


def one_of_two(rank, file, folder):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    rows = experience().select(torch.tensor([[0], [1, 2, 3]][rank]))
    policy = policy_of(f"{folder}/policy")
    torch.save([gram(policy, rows, place)[0] for place in PLACES], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_are_one(tmp_path):
    """Not the sum of the processes' matrices: the gradients are summed first."""
    folder = tiny.policy_folder(tmp_path / "policy", scale=1.0)
    mp.spawn(one_of_two, args=(tmp_path / "meeting", tmp_path), nprocs=2)
    policy = policy_of(folder)
    for index, place in enumerate(PLACES):
        whole_NN = gram(policy, experience(), place)[0]
        for rank in range(2):
            torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt")[index], whole_NN, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("combiner", [Gramian(at="parameters"), GAPO(at="last_layer"), DynamicWeights(at="parameters")])
def test_a_strategy_that_keeps_parameters_in_pieces_is_refused(combiner):
    at, name = combiner.at, type(combiner).__name__
    with pytest.raises(ValueError, match=f"{name} takes gradients at {at}, which FSDP2Strategy shards"):
        check_strategy(combiner, FSDP2Strategy())
    for strategy in (DDPStrategy(), SingleDeviceStrategy()):
        check_strategy(combiner, strategy)
    with pytest.raises(ValueError, match=r"ModelParallelStrategy does not know how .*; use strategy FSDP2Strategy"):
        check_strategy(Linear(), ModelParallelStrategy())
    for other in (Linear(), MGDAUB(), Gramian()):
        check_strategy(other, FSDP2Strategy())
