"""Two processes against one on the same global batches: the same losses, the same weights."""

import socket

import pytest
import torch
import torch.multiprocessing as mp
from transformers import AutoModelForCausalLM

from moa_lightning.combiners import MGDAUB, MOPO, PAMA, Linear
from tests import pairs, processes, tiny

pytestmark = pytest.mark.filterwarnings(
    "ignore:objective 'kind' did not score", "ignore:objective 'good' did not score"
)

COMBINERS = {"Linear": Linear, "PAMA": PAMA, "MGDAUB": MGDAUB, "MOPO": MOPO}
CASES = {
    f"{name}-{'offline' if offline else 'online'}-{'lora' if lora else 'full'}": {
        "combiner": combiner,
        "offline": offline,
        "lora": lora,
    }
    for name, combiner in COMBINERS.items()
    for offline in (False, True)
    for lora in (False, True)
}
CASES |= {
    "lagged-full": {"combiner": MOPO, "offline": True, "lagged": True, "steps": 5},
    "lagged-lora": {"combiner": MOPO, "offline": True, "lora": True, "lagged": True, "steps": 5},
}


def both(strategy, cases, folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(processes.one_of_two, args=(port, strategy, cases, folder), nprocs=2)
    return {name: torch.load(folder / f"{strategy}-{name}.pt") for name in cases}


@pytest.fixture
def folder(tmp_path):
    tiny.policy_folder(tmp_path / "policy", scale=1.0)
    pairs.write(tmp_path / "data.jsonl")
    return tmp_path


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_are_one(folder, strategy, monkeypatch):
    monkeypatch.setattr(processes.Policy, "generate", processes.Policy.generate)  # put back afterwards
    found = both(strategy, CASES, folder)
    for name, case in CASES.items():
        alone = processes.run("one", case, folder)
        assert len(set(alone["losses"])) > 1, name
        torch.testing.assert_close(found[name]["losses"], alone["losses"], rtol=1e-4, atol=1e-5, msg=name)
        torch.testing.assert_close(found[name]["weights"], alone["weights"], rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(found[name]["state"], alone["state"], rtol=1e-4, atol=1e-5, equal_nan=True)


PASSES = {"combiner": PAMA, "passes": 2, "scripted": False}
LAGGED = {"combiner": MOPO, "offline": True, "lagged": True}
DROPOUT = {"combiner": PAMA, "lora": True, "dropout": 0.3, "scripted": False}
RESUMED = {
    f"{part}-{kind}": case | more
    for kind, case in {"passes": PASSES, "lagged": LAGGED, "lora": DROPOUT}.items()
    for part, more in {
        "straight": {"steps": 6},
        "half": {"steps": 3, "save": f"{kind}.ckpt"},
        "whole": {"steps": 6, "resume": f"{kind}.ckpt", "export": kind == "passes"},
    }.items()
}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "fsdp2-layerwise"])
def test_a_run_resumed_between_two_passes_is_the_whole_to_the_bit(folder, strategy):
    found = both(strategy, RESUMED, folder)
    for kind in ("passes", "lagged", "lora"):
        straight, half, whole = (found[f"{part}-{kind}"] for part in ("straight", "half", "whole"))
        assert half["losses"] + whole["losses"] == straight["losses"]
        torch.testing.assert_close(whole["weights"], straight["weights"], rtol=0, atol=0)
        torch.testing.assert_close(whole["state"], straight["state"], rtol=0, atol=0, equal_nan=True)
    saved = torch.load(folder / f"{strategy}-lora.ckpt", weights_only=True)
    assert saved["state_dict"].keys() == {n for n in saved["state_dict"] if "lora_" in n or "value_heads" in n}
    # What was exported opens as plain transformers, with the weights of the run.
    model = AutoModelForCausalLM.from_pretrained(folder / f"exported-{strategy}")
    weights = found["whole-passes"]["weights"]
    assert all(torch.equal(value, weights[f"backbone.{name}"]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_checkpoint_of_another_model_is_refused(folder, strategy):
    lora = {"combiner": Linear, "lora": True, "steps": 1, "save": "other.ckpt"}
    with pytest.raises(mp.ProcessRaisedException, match=r"ValueError: the checkpoint .*; use the run's own"):
        both(strategy, {"lora": lora, "full": {"combiner": Linear, "resume": "other.ckpt"}}, folder)
