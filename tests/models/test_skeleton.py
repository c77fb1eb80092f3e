"""Models read piece by piece by two processes: the weights that transformers reads, and never a whole model."""

import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from peft import LoraConfig, get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, GPT2ForSequenceClassification

from bench.combiners.memory import MemoryTracker
from moa_lightning.distributed.shards import full_state_dict, reshard
from moa_lightning.models import LoRA, Policy, PolicyConfig, ValueHeads
from moa_lightning.models.loading import load_model, load_skeleton, load_tokenizer
from moa_lightning.models.sharding import ShardingPlan, allocate_parameters, copy_shards
from moa_lightning.models.skeleton import UnsuitedError
from moa_lightning.rewards import ImplicitReward, TextClassifier
from moa_lightning.training import strategies
from moa_lightning.training.strategies import FSDP2Strategy
from tests.helpers import tiny

DEEP = {"n_layer": 12, "n_embd": 48}


class RealMemory(MemoryTracker):
    """Counts what takes memory now: the sharding frees storages that tensors still look at; meta tensors have none."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = super().__torch_dispatch__(function, types, args, kwargs)
        self.most = max(self.most, sum(storage.nbytes() for storage in self._seen))
        return result

    def _count(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if tensor.is_meta or isinstance(tensor, DTensor) else super()._count(tensor)


def peak_of(call: Callable[[], object]) -> int:
    with RealMemory() as tracker:
        call()
    return tracker.most


def make_folders(folder: Path) -> None:
    """Policies of several kinds, an adapter and a classifier."""
    tiny.policy_folder(folder / "tied", tiny.gpt2_config())
    tiny.policy_folder(folder / "untied", tiny.llama_config(tie_word_embeddings=False))
    tiny.policy_folder(folder / "deep", tiny.gpt2_config(**DEEP))
    model = AutoModelForCausalLM.from_pretrained(folder / "untied")
    model.generation_config.max_new_tokens = 7  # what the folder says about sampling is not lost
    model.save_pretrained(folder / "files", max_shard_size="20KB")
    model = AutoModelForCausalLM.from_pretrained(folder / "tied")
    model.base_model.save_pretrained(folder / "headless")  # as GPT-2's first checkpoints: without 'transformer.'
    config = LoraConfig(r=2, task_type="CAUSAL_LM", fan_in_fan_out=True, init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(folder / "adapter")
    for name in ("files", "headless", "adapter"):
        tiny.tokenizer().save_pretrained(folder / name)
    torch.manual_seed(3)
    GPT2ForSequenceClassification(tiny.gpt2_config(num_labels=1)).save_pretrained(folder / "judge")
    tiny.tokenizer().save_pretrained(folder / "judge")


POLICIES = {
    "tied": {},
    "untied": {},
    "files": {},
    "headless": {},
    "adapter": {},
    "tied-lora": {"lora": LoRA(r=2)},
    "untied-bfloat16": {"dtype": "bfloat16"},
    "tied-checkpointing": {"gradient_checkpointing": True},
}


def config_of(name: str, folder: Path) -> PolicyConfig:
    return PolicyConfig(str(folder / name.partition("-")[0]), **POLICIES[name])


def read(config: PolicyConfig, plan: ShardingPlan, mesh: torch.distributed.device_mesh.DeviceMesh) -> Policy:
    """As the strategy does."""
    torch.manual_seed(0)
    model, meta_model = load_skeleton(config)
    policy = Policy(model, load_tokenizer(config), ValueHeads(model.config.hidden_size, ["one", "two"]))
    plan.apply(policy, mesh)
    allocate_parameters(policy, torch.device("cpu"))
    meta_model.fill("policy")
    policy.check_logits()
    reshard(policy)
    return policy


TEXTS = ["the film was good", "the plot was very long and dull .", "bad", "the film was fine", "very good and short"]


def one_of_two(number: int, port: int, folder: Path) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(number), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh, found = init_device_mesh("cpu", (2,)), {}
    for name in POLICIES:
        config = config_of(name, folder)
        policy = read(config, ShardingPlan(), mesh)
        model = policy.causal_lm
        tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        rows = {n: len(p.to_local()) for n, p in policy.named_parameters()}
        settings = model.generation_config.to_dict()
        found[name] = full_state_dict(policy.backbone), tied, rows, settings
    twin = Policy(load_skeleton(config_of("tied", folder))[0], policy.tokenizer)
    ShardingPlan().apply(twin, mesh)
    allocate_parameters(twin, torch.device("cpu"))
    source = read(config_of("tied", folder), ShardingPlan(), mesh)
    copy_shards(source.backbone, twin.backbone)
    found["twin"] = full_state_dict(twin.backbone)
    for generation in ("gathered", "layerwise"):
        plan = ShardingPlan(generation=generation)
        rewards = [
            TextClassifier(str(folder / "judge"), batch_size=2),
            ImplicitReward(str(folder / "adapter"), batch_size=2),
        ]
        for reward in rewards:
            reward.shard(lambda model, plan=plan: plan.apply_frozen(model, mesh))
            reward.setup(torch.device("cpu"))
            texts = TEXTS if number else []  # the other process has nothing to score, but must not be waited for
            scores = reward.score(["the"] * len(texts), texts)
            dist.barrier()
            found[generation, type(reward).__name__] = scores
            held = [p for p in reward._model.parameters() if p.numel() > 1]
            found[generation, type(reward).__name__, "held"] = sum(p.to_local().numel() for p in held)
    deep = PolicyConfig(str(folder / "deep"), lora=LoRA(r=1))
    found["peak"] = peak_of(lambda: read(deep, ShardingPlan(), mesh))
    torch.save(found, folder / f"found-{number}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("skeletons")
    make_folders(folder)
    return folder


@pytest.fixture(scope="module")
def found(folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(one_of_two, args=(port, folder), nprocs=2)
    return [torch.load(folder / f"found-{number}.pt", weights_only=False) for number in range(2)]


@pytest.mark.parametrize("name", POLICIES)
def test_pieces_hold_the_weights_that_transformers_reads(name, found, folder):
    torch.manual_seed(0)
    whole = load_model(config_of(name, folder))
    state, tied, _, settings = found[0][name]
    assert state.keys() == whole.state_dict().keys()
    for key, value in whole.state_dict().items():
        assert torch.equal(state[key], value) and state[key].dtype == value.dtype, key
    base = whole.get_base_model() if hasattr(whole, "get_base_model") else whole
    assert tied == (base.get_output_embeddings().weight is base.get_input_embeddings().weight)
    assert load_skeleton(config_of(name, folder))[0].training == whole.training
    assert {k: v or None for k, v in settings.items()} == {
        k: v or None for k, v in base.generation_config.to_dict().items()
    }


def test_each_process_has_its_rows(found):
    for name in POLICIES:
        rows = [of_rank[name][2] for of_rank in found]
        assert rows[0].keys() == rows[1].keys()
        assert all(abs(rows[0][n] - rows[1][n]) <= 1 for n in rows[0])


def test_a_copy_takes_its_pieces_from_the_policys(found):
    state = found[0]["tied"][0]
    assert all(torch.equal(value, state[key]) for key, value in found[0]["twin"].items())


def test_no_process_holds_the_whole_model(found, folder):
    size = sum(p.numel() * 4 for p in load_model(PolicyConfig(str(folder / "deep"))).parameters())
    # A half, what is gathered of one or two blocks of twelve, and the embeddings.
    assert all(0.5 * size < of_rank["peak"] < 0.8 * size for of_rank in found)


@pytest.mark.parametrize("generation", ["gathered", "layerwise"])
@pytest.mark.parametrize("reward", [TextClassifier, ImplicitReward])
def test_rewards_in_pieces_score_as_whole_ones(generation, reward, found, folder):
    whole = reward(str(folder / ("judge" if reward is TextClassifier else "adapter")), batch_size=2)
    expected = whole.score(["the"] * len(TEXTS), TEXTS)
    assert found[0][generation, reward.__name__] == []
    assert found[1][generation, reward.__name__] == pytest.approx(expected, rel=1e-5, abs=1e-7)
    assert len(set(expected)) == len(TEXTS)
    total = sum(p.numel() for p in whole._model.parameters() if p.numel() > 1)
    assert sum(of_rank[generation, reward.__name__, "held"] for of_rank in found) == total


def test_models_that_cannot_be_read_piece_by_piece_say_why(folder, tmp_path):
    for settings, says in (
        ({"options": {"use_cache": True}}, "policy.options .use_cache. are for from_pretrained"),
        ({"lora": LoRA(modules_to_save=["lm_head"])}, "may start from the model's weights"),
        ({"lora": LoRA(options={"init_lora_weights": "pissa"})}, "may start from the model's weights"),
    ):
        with pytest.raises(UnsuitedError, match=says):
            load_skeleton(PolicyConfig(str(folder / "tied"), **settings))
    tiny.policy_folder(tmp_path / "pickled")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "pickled")
    (tmp_path / "pickled/model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pickled/pytorch_model.bin")
    with pytest.raises(UnsuitedError, match="its weights are not in safetensors files"):
        load_skeleton(PolicyConfig(str(tmp_path / "pickled")))
    config = tiny.gpt2_config(n_layer=3)  # one block more than the files hold
    tiny.policy_folder(tmp_path / "short")
    config.save_pretrained(tmp_path / "short")
    with pytest.raises(UnsuitedError, match=r"its files do not hold transformer\.h\.2"):
        load_skeleton(PolicyConfig(str(tmp_path / "short")))


def test_all_processes_read_the_policy_whole_where_one_has_to(folder, monkeypatch):
    policy = PolicyConfig(str(folder / "tied"))
    assert strategies.load(policy, FSDP2Strategy())[1] is not None
    monkeypatch.setattr(strategies, "all_objects", lambda mine: [mine, "its weights are not in safetensors files"])
    with pytest.warns(UserWarning, match="into CPU memory before it is sharded: its weights are not in"):
        model, meta_model = strategies.load(policy, FSDP2Strategy())
    assert meta_model is None
    assert not any(parameter.is_meta for parameter in model.parameters())


def test_a_file_that_is_gone_is_the_users_to_know(folder, tmp_path):
    gone = tmp_path / "gone"
    shutil.copytree(folder / "tied", gone)
    _, meta_model = load_skeleton(PolicyConfig(str(gone)))
    meta_model.files.close()
    (gone / "model.safetensors").unlink()
    allocate_parameters(meta_model.model, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"the weights of the policy cannot be read: .*model.safetensors"):
        meta_model.fill("policy")
