"""Several references as one: against the formula on each model's own log-probabilities."""

import pytest
import torch

from moa_lightning.functional import clip_around_first, confidence_weights, virtual_reference
from moa_lightning.models import LoRA, MultiReference, Policy, PolicyConfig
from moa_lightning.models.loading import load_model, load_tokenizer
from tests.helpers import tiny

GROUP_B = torch.tensor([0, 0, 1, 1])


def load(path, lora=None):
    config = PolicyConfig(str(path), lora=lora)
    return Policy(load_model(config), load_tokenizer(config)).eval()


@pytest.fixture
def paths(tmp_path):
    return [tiny.policy_folder(tmp_path / f"model-{seed}", seed=seed) for seed in range(3)]


def sums(paths, inputs):
    """Log-probabilities (B, K) of whole responses, one model at a time."""
    return torch.stack([load(path)(*inputs).logprobs_BT.sum(1) for path in paths], 1).detach()


@pytest.mark.parametrize("lora", [None, LoRA(r=2, target_modules="all-linear")], ids=["full", "lora"])
@pytest.mark.parametrize("cliprange", [None, 0.1])
@pytest.mark.parametrize("weights", [None, [2.0, 1.0, 1.0]], ids=["adaptive", "fixed"])
def test_sums_are_those_of_the_virtual_reference(paths, lora, cliprange, weights):
    policy = load(paths[0], lora)
    reference = MultiReference([str(path) for path in paths[1:]], weights, cliprange)
    reference.check(lora is not None)
    reference.setup(policy)
    inputs = tiny.padded_batch()
    logprobs_BK = sums(paths, inputs)
    with torch.no_grad():  # training must not move the reference
        for parameter in policy.trainable()[0]:
            parameter.add_(0.1 * torch.randn_like(parameter))
    found_BT = reference.logprobs(policy, *inputs, 1.0, GROUP_B)
    weights_BK = torch.tensor([[0.5, 0.25, 0.25]]).expand(4, 3) if weights else confidence_weights(logprobs_BK, GROUP_B)
    clipped_BK = logprobs_BK if cliprange is None else clip_around_first(logprobs_BK, cliprange)
    torch.testing.assert_close(found_BT.sum(1), virtual_reference(clipped_BK, weights_BK), rtol=1e-4, atol=1e-4)
    assert not found_BT.requires_grad
    assert (found_BT[~inputs[2]] == 0).all()
    loaded_BT = reference.behaviour_logprobs(policy, *inputs, 1.0)
    torch.testing.assert_close(loaded_BT.sum(1), logprobs_BK[:, 0], rtol=1e-4, atol=1e-4)


def test_all_the_weight_on_the_policy_is_its_own_reference(paths):
    policy = load(paths[0])
    reference = MultiReference([str(paths[1])], [1.0, 0.0], None)
    reference.setup(policy)
    inputs = tiny.padded_batch()
    expected = policy(*inputs).logprobs_BT.detach()
    torch.testing.assert_close(reference.logprobs(policy, *inputs, 1.0), expected)


def test_the_other_models_are_no_part_of_the_policy(paths):
    policy = load(paths[0])
    before = set(policy.state_dict())
    reference = MultiReference([str(paths[1])])
    reference.setup(policy)
    assert set(policy.state_dict()) == before
    assert not any(p.requires_grad for other in reference._others for p in other.parameters())


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"paths": []}, "at least one path"),
        ({"paths": ["a"], "cliprange": 1.0}, "cliprange must lie in"),
        ({"paths": ["a"], "weights": [1.0]}, "must hold 2 numbers.*got 1"),
        ({"paths": ["a"], "weights": [1.0, -1.0]}, "must be >= 0"),
    ],
)
def test_values_without_meaning(fields, says):
    with pytest.raises(ValueError, match=says):
        MultiReference(**fields)


def test_a_folder_that_does_not_exist_is_refused_before_any_weights(tmp_path):
    with pytest.raises(ValueError, match=r"reference: folder '\./nowhere' does not exist"):
        MultiReference(["./nowhere"]).check(False)


def test_another_vocabulary_is_refused(paths):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(paths[1])
    tokenizer.add_tokens(["new"])
    tokenizer.save_pretrained(paths[1])
    with pytest.raises(ValueError, match="another vocabulary than the policy"):
        MultiReference([str(paths[1])]).setup(load(paths[0]))
