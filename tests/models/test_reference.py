"""The lagged reference: what it holds at which step, and what it must leave alone."""

import itertools

import pytest
import torch

from moa_lightning.models import FrozenCopy, LaggedCopy, LoRA, Policy, PolicyConfig
from moa_lightning.models.loading import load_model, load_tokenizer
from tests.helpers import tiny

INPUTS = (*tiny.padded_batch(), 1.0)


@pytest.fixture(params=["full", "lora"])
def make(request, tmp_path):
    """Opens the same policy anew at each call."""
    config = PolicyConfig(
        str(tiny.policy_folder(tmp_path / "policy")), lora=LoRA(r=2) if request.param == "lora" else None
    )
    return lambda: Policy(load_model(config), load_tokenizer(config)).eval()


def step(policy, number):
    """What an optimiser step does to the weights, the same at every call with this number."""
    generator = torch.Generator().manual_seed(number)
    with torch.no_grad():
        for parameter in policy.trainable()[0]:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def own(policy):
    with torch.no_grad():
        return policy(*INPUTS).logprobs_BT


def assert_same(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("interval", [1, 2, 3])
def test_every_interval_steps_it_becomes_the_policy_of_interval_steps_before(make, interval):
    policy, reference = make(), LaggedCopy(interval)
    reference.setup(policy)
    history = []
    for number in range(8):
        history.append(own(policy))
        reference.advance(policy, number)
        reference.advance(policy, number)  # two batches for one step, as with accumulation
        expected = history[max(number // interval - 1, 0) * interval]
        assert_same(reference.logprobs(policy, *INPUTS), expected)
        loaded = reference.behaviour_logprobs(policy, *INPUTS)
        if number < 2 * interval:  # the reference is still the policy as it was loaded
            assert loaded is None
        else:
            assert_same(loaded, history[0])
        step(policy, number)
    assert all((a - b).abs().max() > 1e-3 for a, b in itertools.pairwise(history)), "the steps moved nothing"


def test_a_refresh_that_is_due_between_two_batches_comes_with_the_next(make):
    policy, reference = make(), LaggedCopy(3)
    reference.setup(policy)
    history, ages = {}, []
    for number in range(0, 16, 2):
        history[number] = own(policy)
        reference.advance(policy, number)
        now = reference.logprobs(policy, *INPUTS)
        ages.append(number - next(s for s, then in history.items() if torch.equal(then, now)))
        step(policy, number)
    assert ages == [0, 2, 4, 6, 4, 6, 4, 6]  # refreshed at 4, 8 and 12, each time with the policy of 4 steps before


def test_of_lora_the_adapter_alone_is_kept(tmp_path):
    config = PolicyConfig(str(tiny.policy_folder(tmp_path / "policy")), lora=LoRA(r=2))
    policy = Policy(load_model(config), load_tokenizer(config))
    reference = LaggedCopy(1)
    reference.setup(policy)
    for number in range(3):
        step(policy, number)
        reference.advance(policy, number + 1)
    adapter = [p.shape for n, p in policy.backbone.named_parameters() if "lora_" in n]
    state = reference.state_dict()
    assert [w.shape for w in state["lagged"]] == [w.shape for w in state["next"]] == adapter
    held = {id(t): t.numel() for group in vars(reference).values() if isinstance(group, list) for t in group}
    assert sum(held.values()) == 3 * sum(shape.numel() for shape in adapter)  # loaded, lagged, next; no base weights


def test_the_policy_is_as_before_an_evaluation(make):
    policy, reference = make(), LaggedCopy(1)
    reference.setup(policy)
    for number in range(3):
        step(policy, number)
        reference.advance(policy, number + 1)
    policy(*INPUTS).logprobs_BT.sum().backward()

    def seen():
        return {n: (p.data_ptr(), p._version, p.clone(), p.requires_grad) for n, p in policy.named_parameters()}, {
            n: (p.grad.data_ptr(), p.grad.clone()) for n, p in policy.named_parameters() if p.grad is not None
        }

    before = seen()
    lagged = [weight.clone() for weight in reference.state_dict()["lagged"]]
    graph = policy(*INPUTS).logprobs_BT.sum()  # its backward pass is still to come
    for evaluate in (reference.logprobs, reference.behaviour_logprobs):
        logprobs_BT = evaluate(policy, *INPUTS)
        assert not logprobs_BT.requires_grad
        assert (logprobs_BT - own(policy)).abs().max() > 1e-3
    after = seen()
    assert before[1], "there are no gradients to disturb"
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert_same(reference.state_dict()["lagged"], lagged)
    for parameter in policy.parameters():
        parameter.grad = None
    graph.backward()
    torch.testing.assert_close(
        [p.grad for p in policy.parameters() if p.grad is not None], [g for _, g in before[1].values()]
    )


def test_the_policy_comes_back_when_an_evaluation_fails(make):
    policy, reference = make(), LaggedCopy(1)
    reference.setup(policy)
    step(policy, 0)
    before = own(policy)
    with pytest.raises(IndexError):
        reference.logprobs(policy, *INPUTS[:2], torch.ones(4, 99, dtype=torch.bool), 1.0)
    assert_same(own(policy), before)


@pytest.mark.parametrize("steps", range(6))
def test_a_resumed_reference_goes_on_as_the_first(make, tmp_path, steps):
    """Interval 2: before the first refresh, at it, between the two, at the second, after it."""
    policy, reference = make(), LaggedCopy(2)
    reference.setup(policy)

    def go(start, stop):
        for number in range(start, stop):
            reference.advance(policy, number)
            step(policy, number)

    go(0, steps)
    torch.save({"weights": policy.trainable()[0], "reference": reference.state_dict()}, tmp_path / "a.ckpt")
    go(steps, steps + 3)
    straight = [reference.logprobs(policy, *INPUTS), reference.behaviour_logprobs(policy, *INPUTS)]

    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    policy, reference = make(), LaggedCopy(2)
    reference.setup(policy)
    with torch.no_grad():
        for parameter, weight in zip(policy.trainable()[0], saved["weights"], strict=True):
            parameter.copy_(weight)
    reference.load_state_dict(saved["reference"])
    go(steps, steps + 3)
    resumed = [reference.logprobs(policy, *INPUTS), reference.behaviour_logprobs(policy, *INPUTS)]
    torch.testing.assert_close(resumed, straight, rtol=0, atol=0)


def test_a_checkpoint_of_an_unmoved_reference_holds_no_weights(make):
    policy, reference = make(), LaggedCopy(2)
    reference.setup(policy)
    reference.advance(policy, 0)
    assert reference.state_dict() == {"step": 0, "lagged": None, "next": None}
    assert FrozenCopy().state_dict() == {}


def test_the_interval_is_at_least_one():
    with pytest.raises(ValueError, match=r"LaggedCopy\.interval must be at least 1, got 0"):
        LaggedCopy(0)
