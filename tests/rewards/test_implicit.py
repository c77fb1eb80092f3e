"""The reward in a DPO adapter: against log-probabilities of each text alone."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from moa_lightning.rewards import ImplicitReward
from tests.helpers import tiny

PROMPTS = ["the film was", "the plot", "the film was", "short and"]
COMPLETIONS = ["good and very fine .", "dull", "bad", ""]


@pytest.fixture
def folders(tmp_path):
    base = tiny.policy_folder(tmp_path / "base")
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear", fan_in_fan_out=True)
    torch.manual_seed(1)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(tmp_path / "adapter")
    tiny.tokenizer().save_pretrained(tmp_path / "adapter")
    return base, tmp_path / "adapter"


def alone(model, tokenizer, prompt, completion):
    start = tokenizer(prompt)["input_ids"]
    ids = [*start, *tokenizer(completion)["input_ids"], tokenizer.eos_token_id]
    with torch.no_grad():
        logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(float(logprobs[i - 1, ids[i]]) for i in range(len(start), len(ids)))


@pytest.mark.parametrize("batch_size", [1, 3])
def test_scores_are_log_ratios(folders, batch_size):
    base, adapter = folders
    tokenizer = AutoTokenizer.from_pretrained(base)
    without = AutoModelForCausalLM.from_pretrained(base).eval()
    expected = [-0.5 * alone(without, tokenizer, p, c) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    for i, (p, c) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        expected[i] += 0.5 * alone(tuned, tokenizer, p, c)
    reward = ImplicitReward(str(adapter), beta=0.5, batch_size=batch_size)
    assert reward.score(PROMPTS, COMPLETIONS) == pytest.approx(expected, abs=1e-4)
    assert max(map(abs, expected)) > 0.05


def test_a_folder_without_an_adapter_is_refused(folders):
    with pytest.raises(ValueError, match=r"holds no adapter \(adapter_config.json\)"):
        ImplicitReward(str(folders[0])).check(set())


def test_a_missing_folder_is_refused():
    with pytest.raises(ValueError, match=r"folder '\./nowhere' does not exist"):
        ImplicitReward("./nowhere").check(set())


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"beta": 0.0}, r"ImplicitReward\.beta must be a finite number above 0, got 0\.0"),
        ({"beta": float("nan")}, r"ImplicitReward\.beta must be a finite number above 0, got nan"),
        ({"batch_size": 0}, r"ImplicitReward\.batch_size must be at least 1, got 0"),
    ],
)
def test_fields_out_of_range(fields, says):
    with pytest.raises(ValueError, match=says):
        ImplicitReward("nowhere", **fields)
