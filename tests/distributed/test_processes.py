"""Two processes against one on the same global batches: the same losses, the same weights."""

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, GPT2ForSequenceClassification

from moa_lightning.combiners import MGDAUB, MOPO, PAMA, Linear
from tests.helpers import pairs, processes, tiny

pytestmark = pytest.mark.filterwarnings(
    "ignore:objective 'kind' did not score",
    "ignore:objective 'good' did not score",
    "ignore:objective 'short' did not score",
    "ignore:MOPO's labels",
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
TOKENS = {"cliprange": 0.002, "epsilon_high": 0.003, "delta": 1.004, "entropy_coef": 0.01, "cliprange_value": 0.01}
RESPONSES = {"cliprange": 2e-4, "epsilon_high": 3e-4, "delta": 1.0004, "importance_sampling_level": "sequence"}
CASES |= {
    "silent-tokens": {"combiner": PAMA, "silent": True},  # one process has no reward at all
    "silent-gradients": {"combiner": MGDAUB, "silent": True},
    # Bounds so narrow that the second pass over a batch meets each of them.
    "surrogate-tokens": {"combiner": Linear, "passes": 2, "steps": 4, "surrogate": TOKENS},
    "surrogate-responses": {"combiner": Linear, "passes": 2, "steps": 4, "surrogate": RESPONSES},
    "lagged-full": {"combiner": MOPO, "offline": True, "lagged": True, "steps": 5},
    "lagged-lora": {"combiner": MOPO, "offline": True, "lora": True, "lagged": True, "steps": 5},
}
PLAIN = "PAMA-online-full"
SHARDED = {
    "checkpointing-full": CASES[PLAIN] | {"checkpointing": True},
    "checkpointing-lora": CASES["PAMA-online-lora"] | {"checkpointing": True},
    "judge": CASES[PLAIN] | {"judge": True},
}


@pytest.fixture
def folder(tmp_path):
    tiny.policy_folder(tmp_path / "policy", scale=1.0)
    pairs.write(tmp_path / "data.jsonl")
    return tmp_path


@pytest.mark.slow
def test_two_processes_are_one(folder):
    torch.manual_seed(3)
    GPT2ForSequenceClassification(tiny.gpt2_config(num_labels=1)).save_pretrained(folder / "judge")
    tiny.tokenizer().save_pretrained(folder / "judge")
    cells = [(strategy, name, case) for strategy in ("ddp", "fsdp2") for name, case in CASES.items()]
    cells += [(strategy, PLAIN, CASES[PLAIN]) for strategy in ("fsdp2-layerwise", "hsdp", "bfloat16")]
    cells += [("fsdp2", name, case) for name, case in SHARDED.items()]
    cells += [("fsdp2-layerwise", "judge", SHARDED["judge"])]
    found = processes.both(cells, folder)
    alone = {name: processes.run("one", case, folder) for name, case in {**CASES, **SHARDED}.items()}
    rounded = found.pop(("bfloat16", PLAIN))
    assert all(weight.dtype == torch.float32 for weight in rounded["weights"].values())
    assert rounded["losses"] != alone[PLAIN]["losses"]
    torch.testing.assert_close(rounded["losses"], alone[PLAIN]["losses"], rtol=0.05, atol=0.02)
    for (strategy, name), result in found.items():
        cell = f"{strategy} {name}"
        assert len(set(alone[name]["losses"])) > 1, cell
        torch.testing.assert_close(result["losses"], alone[name]["losses"], rtol=1e-4, atol=1e-5, msg=cell)
        assert result["logged"] == pytest.approx(result["losses"][-1], rel=1e-5, abs=1e-7), (
            cell
        )  # of both, not rank 0's
        torch.testing.assert_close(result["weights"], alone[name]["weights"], rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(result["state"], alone[name]["state"], rtol=1e-4, atol=1e-5, equal_nan=True)


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
OTHER = {"combiner": Linear, "resume": "lora.ckpt", "refused": True}  # another combiner, no adapter


@pytest.mark.slow
def test_a_run_resumed_between_two_passes_is_the_whole_to_the_bit(folder):
    strategies = ("ddp", "fsdp2")
    cells = [(strategy, name, case) for strategy in strategies for name, case in (*RESUMED.items(), ("other", OTHER))]
    found = processes.both(cells, folder)
    for strategy in strategies:
        for kind in ("passes", "lagged", "lora"):
            straight, half, whole = (found[strategy, f"{part}-{kind}"] for part in ("straight", "half", "whole"))
            assert half["losses"] + whole["losses"] == straight["losses"]
            torch.testing.assert_close(whole["weights"], straight["weights"], rtol=0, atol=0)
            torch.testing.assert_close(whole["state"], straight["state"], rtol=0, atol=0, equal_nan=True)
        saved = torch.load(folder / f"{strategy}-lora.ckpt", weights_only=True)
        assert saved["state_dict"].keys() == {n for n in saved["state_dict"] if "lora_" in n or "value_heads" in n}
        # What was exported opens as plain transformers, with the weights of the run.
        model = AutoModelForCausalLM.from_pretrained(folder / f"exported-{strategy}")
        with safe_open(folder / f"exported-{strategy}" / "model.safetensors", framework="pt") as file:
            assert "lm_head.weight" not in file.keys()  # noqa: SIM118  # it is the embedding
        weights = found[strategy, "whole-passes"]["weights"]
        assert all(torch.equal(value, weights[f"backbone.{name}"]) for name, value in model.state_dict().items())
        assert "use the run's own config.yaml" in found[strategy, "other"]["refused"]
